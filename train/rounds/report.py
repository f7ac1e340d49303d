"""The page of the rounds: how far the student is from its teacher after each one, and each one's training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavamod_offline.pages.charts import CURVE_SCRIPTS, CURVE_STYLES, curves
from llavamod_offline.pages.page import render
from llavamod_offline.storage.atomic import write_file
from train.metrics import METRICS_NAME
from train.rounds.config import RoundsConfig
from train.rounds.plan import round_folder

_NAMES = {
    "round": "after round",
    "reverse_kl": "KL(student ‖ teacher), nats per token",
    "standard_error": "± standard error",
    "length": "tokens per answer",
    "answers": "answers",
    "rejected": "rejected",
    "reread": "re-tokenised differently",
}


def write_report(config: RoundsConfig, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `report.html` below the rounds' folder and return its path."""
    path = Path(config.output) / "report.html"
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        styles=CURVE_STYLES,
        scripts=CURVE_SCRIPTS,
        title="Rounds on a student's own answers",
        lead=f"{config.rounds} rounds of {config.steps} steps: the student writes, the teacher scores, it learns.",
        header=header(rows),
        rows=[as_cells(row) for row in rows],
        charts=[
            curves(
                "Held-out prompts: KL(student ‖ teacher)", "nats per token", {"student": _points(rows, "reverse_kl")}
            ),
            curves("Held-out prompts: length of answers", "tokens", {"student": _points(rows, "length")}),
            curves(f"Training on own answers: {config.loss}", "nats per token", _losses(config), decades=True),
        ],
        commands=(Path(config.output) / "commands.sh").read_text(encoding="utf-8"),
    )
    write_file(path, page)
    return path


def header(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table's columns: those of `OwnAnswers`, then the benchmarks'."""
    return [_NAMES.get(name, name) for name in rows[0]]


def as_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table as text."""
    return [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["round"], row[name]) for row in rows]


def _losses(config: RoundsConfig) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for number in range(1, config.rounds + 1):
        file = round_folder(config.output, number) / "run" / METRICS_NAME
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[f"round {number}"] = [(line["step"], line["loss"]) for line in lines]
    return found
