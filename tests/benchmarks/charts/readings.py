"""Draw an SVG chart for the README: the excess KL of `readings.json`'s students against bytes per position.

    python -m tests.benchmarks.charts.readings RESULT.json PICTURE.svg

One panel per task: the excess of held-out KL over training on full distributions, against bytes per position, both on
log scales. Rivals of one kind are joined by a line and labelled with the number of ids they keep; light dots are other
splits of a record's bytes between top-k and tail samples.
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

from tests.benchmarks.charts.svg import document, panel
from tests.benchmarks.readings import MEASURED

_WIDTH, _HEIGHT, _LEFT = 420, 300, 56
_BYTES = (8, 16, 32, 64, 128, 256, 512)
_DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_OURS = "#0b6e4f"
# Target names without their numbers → description and colour.
_RIVALS = {
    "rskd": ("n samples (RS-KD)", "#b3261e"),
    "topk": ("k ids, renormalised", "#7a4fbf"),
    "bucket": ("k ids and a bucket", "#b06a00"),
    "distillkit": ("DistillKit", "#2b5fb3"),
}
_TITLES = {"ngram": "4-gram of real text", "low_rank_24": "low-rank soft-max"}


def main() -> None:
    """Read and write the files named on the command line."""
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["regime"] == "curve"))
    presets = [row for row in rows if row["target"] in MEASURED and (row["regime"], row["T"]) == ("one_pass", 1.0)]
    rows = [row for row in rows if row["regime"] == "curve" and row["target"] not in MEASURED] + presets
    panels = [_panel(task, [row for row in rows if row["task"] == task], place) for place, task in enumerate(tasks)]
    legend = [("presets, and other splits of their bytes between top-k and samples", _OURS), *_RIVALS.values()]
    width = len(tasks) * (_WIDTH + _LEFT + 20)
    Path(sys.argv[2]).write_text(document(panels, legend, width=width, height=_HEIGHT, left=_LEFT))


def _panel(task: str, rows: list[dict[str, Any]], place: int) -> str:
    parts = [f'<text x="0" y="-14" font-weight="bold">{escape(_TITLES.get(task, task))}</text>']
    for size in _BYTES:
        parts.append(f'<path d="M{_x(size):.1f} 0V{_HEIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_x(size):.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{size}</text>')
    for decade in _DECADES:
        parts.append(f'<path d="M0 {_y(decade):.1f}H{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{_y(decade) + 4:.1f}" text-anchor="end">{decade:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 34}" text-anchor="middle">bytes per position</text>')
    if place == 0:
        parts.append(
            f'<text transform="translate(-44 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">excess KL, nats</text>'
        )
    shown = [row for row in rows if row["target"] not in ("dense", "labels") and row["excess"] > 0]
    for kind, (_, colour) in _RIVALS.items():
        points = sorted((row["bytes"], row["excess"], row["target"]) for row in shown if _kind(row["target"]) == kind)
        line = "L".join(f"{_x(size):.1f} {_y(excess):.1f}" for size, excess, _ in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-opacity=".5"/>')
        for size, excess, name in points:
            x, y = _x(size), _y(excess)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            number = name.removeprefix(kind).strip("_")
            parts.append(f'<text x="{x + 5:.1f}" y="{y - 5:.1f}" fill="{colour}" font-size="10">{number}</text>')
    for row in shown:
        x, y, name = _x(row["bytes"]), _y(row["excess"]), row["target"]
        if name in MEASURED:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_OURS}"/>')
            where = f'x="{x - 8:.1f}" y="{y + 12:.1f}" text-anchor="end"'
            parts.append(f'<text {where} fill="{_OURS}" font-weight="bold">{name}</text>')
        elif name.startswith("n"):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_OURS}" fill-opacity=".35"/>')
    return panel(parts, _LEFT + place * (_WIDTH + _LEFT + 20))


def _kind(target: str) -> str:
    return target.removesuffix("_budget").rstrip("0123456789")


def _x(size: float) -> float:
    return _WIDTH * math.log(size / _BYTES[0]) / math.log(_BYTES[-1] / _BYTES[0])


def _y(excess: float) -> float:
    share = math.log(excess / _DECADES[0]) / math.log(_DECADES[-1] / _DECADES[0])
    return _HEIGHT * (1 - max(share, 0.0))


if __name__ == "__main__":
    main()
