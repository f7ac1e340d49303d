"""Self-contained HTML pages: one style, line charts as inline SVG, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

PALETTE = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --card: #ffffff; --page: #f8fafc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --card: #1f2937; --page: #111827; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; padding: 2rem;
  max-width: 72rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead, .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; overflow-x: auto; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
img.picture { width: 8rem; height: 8rem; object-fit: contain; image-rendering: auto; border-radius: .4rem; }
.right { color: #059669; } .wrong { color: #dc2626; }
svg text { fill: var(--soft); font-size: 11px; } svg .axis { stroke: var(--line); }
code { background: var(--line); border-radius: .25rem; padding: 0 .25rem; }
"""


def html_page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page from a title, a sentence and (heading, HTML) sections."""
    body = "".join(f"<h2>{escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}</body></html>\n'
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text cells; the first column is left-aligned."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(encoded: bytes, *, description: str) -> str:
    """An image file as an inline picture."""
    kind = "png" if encoded.startswith(b"\x89PNG") else "webp" if encoded[8:12] == b"WEBP" else "jpeg"
    data = base64.b64encode(encoded).decode()
    return f'<img class="picture" alt="{escape(description)}" src="data:image/{kind};base64,{data}">'


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
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        x = x_min + x_span * tick / 4
        at = left + (right - left) * tick / 4
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.0f}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    for number, (name, curve) in enumerate(finite.items()):
        colour = PALETTE[number % len(PALETTE)]
        path = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        legend.append(f'<span style="color:{colour}">&#9632;</span> {escape(name)}')
    drawing = f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">{"".join(parts)}</svg>'
    return (
        f'<div class="card"><b>{escape(title)}</b><br>{drawing}<div class="soft">{" &nbsp; ".join(legend)}</div></div>'
    )
