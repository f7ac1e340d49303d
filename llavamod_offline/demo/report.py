"""The demo's page: the table, the curves, and a few images with every model's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamod_offline.demo.plan import models
from llavamod_offline.demo.results import COLUMNS, as_cells
from llavamod_offline.demo.results import curves as logged
from llavamod_offline.pages.charts import CURVE_SCRIPTS, CURVE_STYLES, curves
from llavamod_offline.pages.page import data_uri, render

IMAGES = 12
_RUNS = ("mimic_dense", "smaller", "mimic_sparse", "align", "sft", "preference")


def write_report(output: Path, summary: Mapping[str, Any]) -> Path:
    """Write `report.html` below `output` and return its path."""
    path = output / "report.html"
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        styles=CURVE_STYLES,
        scripts=CURVE_SCRIPTS,
        title="LLaVA-MoD Offline: the demo",
        lead="One teacher, run once; five students trained without loading it.",
        header=COLUMNS.values(),
        rows=[as_cells(row) for row in summary["rows"]],
        cache=summary["cache"],
        charts=_charts(output / "train"),
        cards=_cards(output),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _charts(train: Path) -> list[dict[str, Any]]:
    return [
        curves(title, unit, {run: logged(train / run, field) for run in _RUNS[first:end]}, colours=range(first, end))
        for title, unit, field, first, end in (
            ("True KL(teacher ‖ student)", "nats per token", "kl", 0, 3),
            ("Cross-entropy without a teacher", "nats per token", "loss", 3, 5),
            ("Margin of chosen over rejected, beyond the teacher's", "β·(r_w − r_l)", "reward_margin", 5, 6),
        )
    ]


def _cards(output: Path) -> list[dict[str, Any]]:
    """The first images of the benchmark in GQA's format, each with a question that the models answer differently."""
    root = output / "benchmarks" / "gqa"
    truth = json.loads((root / "testdev_balanced_questions.json").read_text())
    answers = {
        model.name: _answers(output / "eval" / model.slug / "gqa" / "predictions.jsonl") for model in models(output)
    }
    chosen: dict[str, str] = {}
    for identifier, question in truth.items():
        given = {texts.get(identifier, "").lower() for texts in answers.values()}
        if len(given) > 1:
            chosen.setdefault(question["imageId"], identifier)
    cards = []
    for image, identifier in list(chosen.items())[:IMAGES]:
        question = truth[identifier]
        texts = {model: found.get(identifier, "") for model, found in answers.items()}
        cards.append(
            {
                "image": data_uri((root / "data" / "images" / f"{image}.jpg").read_bytes()),
                "question": question["question"],
                "answer": question["answer"],
                "answers": [
                    (model, text, text.rstrip(".").lower() == question["answer"]) for model, text in texts.items()
                ],
            }
        )
    return cards


def _answers(file: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {str(row["id"]): row["text"] for row in rows}
