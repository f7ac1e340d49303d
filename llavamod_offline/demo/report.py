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
# Chart titles, units, log fields and the slugs of the models to draw: each stage has axes of its own.
_CHARTS = (
    ("Dense distillation: true KL(teacher ‖ student)", "nats per token", "kl", ("mimic_dense", "smaller")),
    ("Sparse distillation: true KL(teacher ‖ student)", "nats per token", "kl", ("mimic_sparse",)),
    ("Training without teacher: cross-entropy", "nats per token", "loss", ("sft",)),
    ("Alignment, from which these start: cross-entropy", "nats per token", "loss", ("align",)),
    (
        "Preference: margin of chosen over rejected, beyond the teacher's",
        "β·(r_w − r_l)",
        "reward_margin",
        ("preference",),
    ),
)


def write_report(output: Path, summary: Mapping[str, Any]) -> Path:
    """Write `report.html` below `output` and return its path."""
    path = output / "report.html"
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        styles=CURVE_STYLES,
        scripts=CURVE_SCRIPTS,
        title="LLaVA-MoD Offline: the demo",
        lead="One teacher, run once; five students trained without loading it.",
        header=list(COLUMNS.values()),
        rows=[as_cells(row) for row in summary["rows"]],
        cache=summary["cache"],
        routing=summary["routing"],
        charts=_charts(output),
        cards=_cards(output),
        commands=(output / "commands.sh").read_text(encoding="utf-8"),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _charts(output: Path) -> list[dict[str, Any]]:
    """The stages' curves, with the names and colours that the models have in the table."""
    places = {model.slug: (model.name, place) for place, model in enumerate(models(output))}
    places["align"] = ("aligned projector", len(places))
    return [
        curves(
            title,
            unit,
            {places[slug][0]: logged(output / "train" / slug, field) for slug in slugs},
            colours=[places[slug][1] for slug in slugs],
            decades=field in ("kl", "loss"),
        )
        for title, unit, field, slugs in _CHARTS
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
