"""Bars of several models' figures, one panel a benchmark, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eval.published import Headline
from eval.report import Run, incomparable, references

PANEL_WIDTH, BAR_HEIGHT, GAP, HEAD = 300, 18, 6, 34
PANELS_IN_A_ROW = 3
COLOURS = ("#3b6fd4", "#e07b39", "#3a9d6e", "#9b59b6", "#c2405a", "#6b7a8f", "#b8972e", "#2f9db0")


def colour(index: int) -> str:
    """The colour of the run with this index, the same everywhere on the page."""
    return COLOURS[index % len(COLOURS)]


def bars(runs: Sequence[Run], columns: Sequence[Headline]) -> str:
    """One panel a headline; thin marks show published figures that may be compared."""
    height = HEAD + len(runs) * (BAR_HEIGHT + GAP) + 16
    rows = -(-len(columns) // PANELS_IN_A_ROW)
    width = min(len(columns), PANELS_IN_A_ROW) * PANEL_WIDTH
    panels = []
    for index, column in enumerate(columns):
        x, y = index % PANELS_IN_A_ROW * PANEL_WIDTH, index // PANELS_IN_A_ROW * height
        panels.append(f'<g transform="translate({x},{y})">{_panel(runs, column)}</g>')
    return (
        f'<svg role="img" aria-label="Scores of the compared models" viewBox="0 0 {width} {rows * height}" '
        f'style="max-width:{width}px">{"".join(panels)}</svg>'
    )


def _panel(runs: Sequence[Run], column: Headline) -> str:
    inner = PANEL_WIDTH - 90
    better = "lower is better" if column.lower_is_better else "higher is better"
    parts = [
        f'<text x="8" y="16" class="title">{escape(column.title)}</text>',
        f'<text x="8" y="29" class="small">{better}</text>',
    ]
    figures = [run.figure(column) for run in runs]
    marks = [] if incomparable(column, runs) else _marks(column)
    # A bar's length is honest, it starts at zero; rates far below their best get a scale of their own.
    largest = max([value for value in figures if value is not None] + [value for _, value in marks], default=0.0)
    scale = inner / (min(column.best, largest * 1.25) or 1.0)
    for row, value in enumerate(figures):
        y = HEAD + row * (BAR_HEIGHT + GAP)
        name = escape(runs[row].name)
        length = 0.0 if value is None else value * scale
        text = "–" if value is None else column.shown(value)
        parts.append(
            f'<rect x="8" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" rx="3" fill="{colour(row)}">'
            f"<title>{name}: {text}</title></rect>"
            f'<text x="{8 + length + 5:.1f}" y="{y + 13}" class="value">{text}</text>'
        )
    bottom = HEAD + len(runs) * (BAR_HEIGHT + GAP)
    for name, value in marks:
        x = 8 + value * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 3}" y2="{bottom}" class="mark">'
            f"<title>{escape(name)}, published: {column.shown(value)}</title></line>"
        )
    return "".join(parts)


def _marks(column: Headline) -> list[tuple[str, float]]:
    return [(p.model, p.figures[column.key]) for p in references([column])]
