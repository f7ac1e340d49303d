"""Draw an SVG chart for the README: the students of `language_model.json` over their training steps.

    python -m tests.benchmarks.charts.language_model RESULT.json PICTURE.svg

Left: held-out KL(teacher ‖ student), the mean over seeds. Right: its mean excess over the student of the live teacher
with the same seed, with standard errors.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import mean, stdev

from tests.benchmarks.charts.svg import document, panel

_WIDTH, _HEIGHT, _LEFT = 380, 260, 60
_COLOURS = {
    "live": ("live teacher", "#111827"),
    "standard": ("standard", "#0b6e4f"),
    "compact": ("compact", "#34a37a"),
    "small": ("small", "#8fc9ae"),
    "rskd50": ("50 samples (RS-KD)", "#b3261e"),
    "topk50": ("50 ids, renormalised", "#7a4fbf"),
    "labels": ("text alone", "#b06a00"),
}
# A target's points: (step, value, its standard error).
Line = list[tuple[int, float, float]]


def main() -> None:
    """Read and write the files named on the command line."""
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    kls: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        kls[row["target"]][row["step"]][row["seed"]] = row["kl"]
    whole = {name: [(step, mean(by_seed.values()), 0.0) for step, by_seed in kls[name].items()] for name in kls}
    beyond = {name: _beyond(kls[name], kls["live"]) for name in kls if name != "live"}
    panels = [_panel("held-out KL, nats", whole, 0), _panel("beyond the live teacher's, nats", beyond, 1)]
    legend = [_COLOURS[name] for name in kls]
    width = 2 * (_WIDTH + _LEFT) + 20
    Path(sys.argv[2]).write_text(document(panels, legend, width=width, height=_HEIGHT, left=_LEFT))


def _beyond(mine: dict[int, dict[int, float]], live: dict[int, dict[int, float]]) -> Line:
    found = []
    for step, by_seed in mine.items():
        excess = [kl - live[step][seed] for seed, kl in by_seed.items()]
        error = stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
        found.append((step, mean(excess), error))
    return found


def _panel(title: str, lines: dict[str, Line], place: int) -> str:
    last = max(step for line in lines.values() for step, _, _ in line)
    values = [value + sign * error for line in lines.values() for _, value, error in line for sign in (-1, 1)]
    low, high = min(0.0, *values), max(values)
    unit = 10.0 ** math.floor(math.log10((high - low) / 2))
    unit *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * unit) <= 8)
    ticks = [unit * number for number in range(math.ceil(low / unit), math.floor(high / unit) + 1)]

    def x(step: int) -> float:
        return _WIDTH * step / last

    def y(value: float) -> float:
        return _HEIGHT * (high - value) / (high - low)

    parts = [f'<text x="0" y="-14" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        parts.append(f'<path d="M0 {y(tick):.1f}H{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for step in range(0, last + 1, max(last // 4, 1)):
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 34}" text-anchor="middle">steps</text>')
    for name, line in lines.items():
        colour = _COLOURS[name][1]
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value, _ in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        bars = "".join(
            f"M{x(step):.1f} {y(value - error):.1f}V{y(value + error):.1f}" for step, value, error in line if error
        )
        parts.append(f'<path d="{bars}" stroke="{colour}" stroke-opacity=".5"/>' if bars else "")
    return panel(parts, _LEFT + place * (_WIDTH + _LEFT))


if __name__ == "__main__":
    main()
