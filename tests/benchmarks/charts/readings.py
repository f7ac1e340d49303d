"""Draw `readings.json`'s curve of students over bytes as an SVG file for the README.

    python -m tests.benchmarks.charts.readings RESULT.json PICTURE.svg

One panel a task: excess of held-out KL over training on full distributions, against bytes a position, both by decades.
Grey dots are records of any split between top-k and samples; the presets are named among them, and so are the rivals.
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

from tests.benchmarks.readings import MEASURED

_WIDTH, _HEIGHT, _LEFT, _TOP = 420, 300, 56, 34
_BYTES = (8, 16, 32, 64, 128, 256, 512)
_DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TITLES = {"ngram": "4-gram of real text", "low_rank_24": "low-rank soft-max"}


def main() -> None:
    """Read and write the files that the command line names."""
    rows = [row for row in json.loads(Path(sys.argv[1]).read_text())["rows"] if row["regime"] == "curve"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    panels = [_panel(task, [row for row in rows if row["task"] == task], place) for place, task in enumerate(tasks)]
    width = len(tasks) * (_WIDTH + _LEFT + 20)
    Path(sys.argv[2]).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT + _TOP + 46}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{"".join(panels)}</svg>\n'
    )


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
    for row in rows:
        if row["target"] in ("dense", "labels") or row["excess"] <= 0:
            continue
        x, y, name = _x(row["bytes"]), _y(row["excess"]), row["target"]
        if name in MEASURED:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#0b6e4f"/>')
            parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="#0b6e4f" font-weight="bold">{name}</text>')
        elif name.startswith("n"):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="#999"/>')
        else:
            parts.append(f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="#b3261e" stroke-width="1.5"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="#b3261e" font-size="9">{escape(name)}</text>')
    left = _LEFT + place * (_WIDTH + _LEFT + 20)
    return f'<g transform="translate({left} {_TOP})">\n' + "\n".join(parts) + "\n</g>\n"


def _x(size: float) -> float:
    return _WIDTH * math.log(size / _BYTES[0]) / math.log(_BYTES[-1] / _BYTES[0])


def _y(excess: float) -> float:
    share = math.log(excess / _DECADES[0]) / math.log(_DECADES[-1] / _DECADES[0])
    return _HEIGHT * (1 - max(share, 0.0))


if __name__ == "__main__":
    main()
