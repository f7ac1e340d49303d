"""The ladder's page: the claims with their charts, the table, the load of experts, and a few images."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llavamod_offline.ladder.results import COLUMNS, comparison_text
from llavamod_offline.pages.page import data_uri, render
from llavamod_offline.plural import counted
from llavamod_offline.storage.atomic import write_file

PAGE_NAME = "report.html"


def write_report(path: Path, summary: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of a summary; `examples`: as a seed's results hold them."""
    rows = {row["run"]: row for row in summary["rows"]}
    seeds = len(summary["seeds"])
    page = render(
        Path(__file__).with_name("report.html.jinja"),
        styles=("ladder.css",),
        title="LLaVA-MoD Offline: the ladder",
        lead=f"What each stage and each target gives: {len(rows) - 1} students, {counted(seeds, 'seed')} each.",
        claims=[_chart(claim, rows) for claim in summary["claims"].values()],
        header=["model", *COLUMNS.values(), "activated", "bytes per position", "train s"],
        groups=[
            (group, [_cells(row, rows) for row in found])
            for group, found in groupby(summary["rows"], lambda row: row["group"])
        ],
        seeds=seeds,
        least=[f"{p:.3f}".lstrip("0") for p in (0.5**seeds, min(2 * 0.5**seeds, 1.0))],
        load=[_load(row) for row in summary["rows"] if row["expert_load"]],
        examples=[{**example, "image": data_uri(base64.b64decode(example["image"]))} for example in examples],
    )
    write_file(path, page)


def _chart(claim: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """A claim with the two rows' values, placed in per cent of a range that holds both."""
    lines = [(rows[run]["name"], rows[run]["columns"][claim["column"]]) for run in (claim["row"], claim["than"])]
    values: list[float] = [value for _, column in lines for value in column["values"] if value is not None] or [0.0]
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0  # else dots would sit on the edges
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    return {
        "text": claim["text"],
        "verdict": claim["verdict"],
        "holds": claim["holds"],
        "column": COLUMNS[claim["column"]],
        "figures": comparison_text(claim),
        "lines": [
            {
                "name": name,
                "text": _with_spread(column),
                "mean": None if column["mean"] is None else place(column["mean"]),
                "dots": [(place(value), f"{value:.4f}") for value in column["values"] if value is not None],
            }
            for name, column in lines
        ],
        "ends": (f"{low:.3f}", f"{high:.3f}"),
    }


def _cells(row: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    compared = rows.get(row["compared_with"])
    stored = row["bytes_per_position"]
    return {
        "name": row["name"],
        "compared_with": "" if compared is None else f"compared with: {compared['name']}",
        "cells": [
            *((_with_spread(row["columns"][name]), comparison_text(row["columns"][name])) for name in COLUMNS),
            (f"{row['activated_parameters'] / 1e6:.2f} M", ""),
            ("–" if stored is None else f"{stored:.1f}", ""),
            ("–" if row["seconds"] is None else f"{row['seconds']:.0f}", ""),
        ],
    }


def _load(row: Mapping[str, Any]) -> dict[str, Any]:
    """The experts' shares of the tokens in the last step of training, as `parts.bars` takes them."""
    layers = row["expert_load"]
    places = [(layer, expert, share) for layer, shares in enumerate(layers) for expert, share in enumerate(shares)]
    return {
        "title": row["name"],
        "rows": [
            (
                f"layer {layer + 1}, expert {expert + 1}" if len(layers) > 1 else f"expert {expert + 1}",
                share,
                f"{share:.2f}",
            )
            for layer, expert, share in places
        ],
        "equal": 1 / len(layers[0]),
    }


def _with_spread(column: Mapping[str, Any]) -> str:
    if column["mean"] is None:
        return "–"
    return f"{column['mean']:z.3f}" + ("" if column["spread"] is None else f" ± {column['spread']:.3f}")
