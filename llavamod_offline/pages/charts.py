"""Charts for `page.py`'s pages, as inline SVG or as plain HTML that a narrow window folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from llavamod_offline.pages.page import PALETTE

_PANEL_WIDTH, _BAR_HEIGHT, _GAP, _HEAD = 300, 18, 6, 34
_PANELS_IN_A_ROW = 3


def colour(index: int) -> str:
    """The colour of the series with this index, the same everywhere on a page."""
    return PALETTE[index % len(PALETTE)]


def colour_key(index: int, name: str) -> str:
    """A series' name behind a patch of its colour."""
    return f'<span class="key" style="background:{colour(index)}"></span>{escape(name)}'


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    width: int = 520,
    height: int = 260,
) -> str:
    """Curves over one axis of steps, with a legend; points that are not finite are left out."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    points = [point for curve in finite.values() for point in curve]
    if not points:
        return f'<div class="card"><b>{escape(title)}</b><p class="soft">nothing was logged</p></div>'
    left, right, top, bottom = 46, width - 10, 12, height - 34
    x_min, x_max = min(x for x, _ in points), max(x for x, _ in points)
    y_min, y_max = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    x_span, y_span = (x_max - x_min) or 1.0, (y_max - y_min) or 1.0

    def place(x: float, y: float) -> str:
        return (
            f"{left + (x - x_min) / x_span * (right - left):.1f},{bottom - (y - y_min) / y_span * (bottom - top):.1f}"
        )

    parts = []
    for tick in range(5):
        y = y_min + y_span * tick / 4
        at = bottom - (bottom - top) * tick / 4
        parts.append(f'<line class="axis" x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_label(y)}</text>')
        x = x_min + x_span * tick / 4
        at = left + (right - left) * tick / 4
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.0f}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    for number, (name, curve) in enumerate(finite.items()):
        path = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline fill="none" stroke="{colour(number)}" stroke-width="1.8" points="{path}"/>')
        legend.append(colour_key(number, name))
    drawing = f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">{"".join(parts)}</svg>'
    return (
        f'<div class="card"><b>{escape(title)}</b><br>{drawing}<div class="soft">{" &nbsp; ".join(legend)}</div></div>'
    )


def _label(value: float) -> str:
    """A number of three digits in few letters: 7.8k, 0.25, 5e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if value and abs(value) < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class BarPanel:
    """One panel of bars: (name, value, text) a series in the series' order; a None has no bar.

    `marks`: thin lines, of the same form. `largest`: the value that fills the panel.
    """

    title: str
    note: str
    bars: Sequence[tuple[str, float | None, str]]
    largest: float
    marks: Sequence[tuple[str, float, str]] = field(default=())


def bar_panels(label: str, panels: Sequence[BarPanel]) -> str:
    """Panels of bars side by side; a bar begins at zero, and its colour is that of its series."""
    if not panels:
        return ""
    rows_of_bars = max(len(panel.bars) for panel in panels)
    height = _HEAD + rows_of_bars * (_BAR_HEIGHT + _GAP) + 16
    width = min(len(panels), _PANELS_IN_A_ROW) * _PANEL_WIDTH
    parts = []
    for index, panel in enumerate(panels):
        x, y = index % _PANELS_IN_A_ROW * _PANEL_WIDTH, index // _PANELS_IN_A_ROW * height
        parts.append(f'<g transform="translate({x},{y})">{_bar_panel(panel)}</g>')
    rows = -(-len(panels) // _PANELS_IN_A_ROW)
    return (
        f'<div class="card"><svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {rows * height}" '
        f'width="100%" style="max-width:{width}px">{"".join(parts)}</svg></div>'
    )


def _bar_panel(panel: BarPanel) -> str:
    parts = [
        f'<text x="8" y="16" class="title">{escape(panel.title)}</text>',
        f'<text x="8" y="29">{escape(panel.note)}</text>',
    ]
    scale = (_PANEL_WIDTH - 90) / (panel.largest or 1.0)
    for row, (name, value, text) in enumerate(panel.bars):
        y = _HEAD + row * (_BAR_HEIGHT + _GAP)
        length = 0.0 if value is None else value * scale
        parts.append(
            f'<rect x="8" y="{y}" width="{length:.1f}" height="{_BAR_HEIGHT}" rx="3" fill="{colour(row)}">'
            f"<title>{escape(name)}: {escape(text)}</title></rect>"
            f'<text x="{8 + length + 5:.1f}" y="{y + 13}" class="value">{escape(text)}</text>'
        )
    bottom = _HEAD + len(panel.bars) * (_BAR_HEIGHT + _GAP)
    for name, value, text in panel.marks:
        x = 8 + value * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD - 3}" y2="{bottom}" class="mark">'
            f"<title>{escape(name)}: {escape(text)}</title></line>"
        )
    return "".join(parts)


def bar_list(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """(name, value, text) a line, the longest bar filling its column."""
    largest = max((value for _, value, _ in bars), default=0.0) or 1.0
    lines = (
        f'<span>{escape(name)}</span><i style="width:{100 * value / largest:.2f}%"></i><span>{escape(text)}</span>'
        for name, value, text in bars
    )
    return f'<div class="card"><h3>{escape(title)}</h3><div class="bars">{"".join(lines)}</div></div>'


def histograms(title: str, note: str, edges: Sequence[float], series: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """A small histogram of each series, (counts, remark), on one scale of shares; bin i lies above `edges[i]`.

    The last edge may be infinite.
    """
    shares = {name: [count / max(sum(counts), 1) for count in counts] for name, (counts, _) in series.items()}
    tallest = max((share for found in shares.values() for share in found), default=0.0) or 1.0
    panels = []
    for index, (name, (_, remark)) in enumerate(series.items()):
        columns = []
        for share, low, high in zip(shares[name], edges, edges[1:], strict=False):
            span = f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}"
            tall = f'<i style="height:{100 * share / tallest:.1f}%"></i>' if share else ""
            columns.append(f'<span title="{span}: {share:.1%}">{tall}</span>')
        ticks = "".join(f"<span>{_tick(edge)}</span>" for edge in edges[:-1])
        panels.append(
            f'<div class="hist" style="--colour:{colour(index)}"><b>{escape(name)}</b> '
            f'<span class="soft">{escape(remark)}</span>'
            f'<div class="columns" role="img" aria-label="{escape(name)}: {escape(remark)}">{"".join(columns)}</div>'
            f'<div class="edges" aria-hidden="true">{ticks}</div></div>'
        )
    return (
        f'<div class="card"><h3>{escape(title)}</h3><small>{escape(note)}</small><br>'
        f'<div class="hists">{"".join(panels)}</div></div>'
    )


def _tick(edge: float) -> str:
    """A number below 1 without its zero: bins are narrow."""
    text = f"{edge:g}"
    return text[1:] if text.startswith("0.") else text
