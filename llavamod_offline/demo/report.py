"""The demo's page: the table, the curves, and a few images with every model's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from llavamod_offline.demo.plan import models
from llavamod_offline.demo.results import COLUMNS, as_cells, curves
from llavamod_offline.pages.charts import line_chart
from llavamod_offline.pages.page import html_page, html_table, picture

PICTURES = 12


def write_report(output: Path, summary: Mapping[str, Any]) -> Path:
    """Write `report.html` below `output` and give its path."""
    table = html_table(list(COLUMNS.values()), [as_cells(row) for row in summary["rows"]])
    cache = summary["cache"]
    note = (
        f'<p class="soft">The teacher ran once: {cache["positions"]:,} supervised positions in '
        f"{cache['bytes_per_position']:.1f} bytes each, all in. "
        "The smaller student learnt from the very records that the distilled one did. "
        "Shape: layers × hidden size, rows of the head. "
        "Accuracy: exact answers on the toy questions (GQA's form). "
        "Hallucination: share of descriptions that name something absent, lower is better.</p>"
    )
    lead = "One teacher, run once; five students that never met it."
    page = html_page(
        "LLaVA-MoD Offline: the demo",
        lead,
        [("Models", table + note), ("Training", _charts(output)), ("Pictures", _pictures(output))],
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _charts(output: Path) -> str:
    train = output / "train"
    charts = [
        line_chart(
            "True KL(teacher ‖ student), nats a token",
            {name: curves(train / name, "kl") for name in ("mimic_dense", "smaller", "mimic_sparse")},
            x_label="step",
        ),
        line_chart(
            "Cross-entropy without a teacher, nats a token",
            {name: curves(train / name, "loss") for name in ("align", "sft")},
            x_label="step",
        ),
        line_chart(
            "Preference: margin of chosen over rejected beyond the teacher's, β·(r_w − r_l)",
            {"reward margin": curves(train / "preference", "reward_margin")},
            x_label="step",
        ),
    ]
    return f'<div class="grid">{"".join(charts)}</div>'


def _pictures(output: Path) -> str:
    """The first images of the GQA-form benchmark, a question each that not every model answers alike."""
    root = output / "benchmarks" / "gqa"
    truth = json.loads((root / "testdev_balanced_questions.json").read_text())
    answers = {
        model.name: _answers(output / "eval" / model.slug / "gqa" / "predictions.jsonl") for model in models(output)
    }
    chosen: dict[str, str] = {}
    for identifier, question in truth.items():
        said = {answers[name].get(identifier, "").lower() for name in answers}
        if len(said) > 1 and question["imageId"] not in chosen:
            chosen[question["imageId"]] = identifier
    cards = []
    for image, identifier in list(chosen.items())[:PICTURES]:
        question = truth[identifier]
        rows = []
        for name in answers:
            answer = answers[name].get(identifier, "")
            verdict = "right" if answer.rstrip(".").lower() == question["answer"] else "wrong"
            rows.append(f'<tr><td>{escape(name)}</td><td class="{verdict}">{escape(answer)}</td></tr>')
        encoded = (root / "data" / "images" / f"{image}.jpg").read_bytes()
        cards.append(
            f'<div class="card">{picture(encoded, description=question["question"])}'
            f"<p><b>{escape(question['question'])}</b> {escape(question['answer'])}</p>"
            f"<table>{''.join(rows)}</table></div>"
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _answers(file: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {str(row["id"]): row["text"] for row in rows}
