"""Data of the charts that `templates/parts.html.jinja` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

CURVE_STYLES, CURVE_SCRIPTS = ("uPlot.min.css",), ("uPlot.iife.min.js", "curves.js")  # what a page with curves needs


def curves(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    colours: Sequence[int] | None = None,
    decades: bool = False,
) -> dict[str, Any]:
    """Curves of (step, value) points for `parts.curves`; points that are not finite are left out.

    `colours`: an index into the palette per series; by default 0, 1, 2… `decades`: the scale is logarithmic if all
    values are positive and the largest is at least ten times the smallest, as with a loss that falls by decades.
    """
    found = [{step: value for step, value in points if math.isfinite(value)} for points in series.values()]
    steps = sorted({step for points in found for step in points})
    lines = [
        {"name": name, "colour": colour, "values": [points.get(step) for step in steps]}
        for name, points, colour in zip(series, found, colours or range(len(found)), strict=True)
    ]
    values = [value for points in found for value in points.values()]
    log = decades and bool(values) and min(values) > 0 and max(values) >= 10 * min(values)
    return {"title": title, "unit": unit, "log": log, "steps": steps, "series": lines}


def histograms(edges: Sequence[float], series: Mapping[str, tuple[Sequence[int], str]]) -> list[dict[str, Any]]:
    """A histogram per series of (counts, remark) for `parts.histograms`, on one scale of shares.

    Bin i starts at `edges[i]`; the last edge may be infinite.
    """
    shares = {name: [count / max(sum(counts), 1) for count in counts] for name, (counts, _) in series.items()}
    tallest = max((share for found in shares.values() for share in found), default=0.0) or 1.0
    spans = [f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [
        {
            "name": name,
            "remark": remark,
            "ticks": [f"{edge:g}" for edge in edges[:-1]],
            "columns": [
                (f"{span}: {share:.1%}", 100 * share / tallest) for span, share in zip(spans, shares[name], strict=True)
            ],
        }
        for name, (_, remark) in series.items()
    ]
