"""Self-contained HTML pages: one style for light and dark, nothing loaded from elsewhere, no script but their own.

Text reaches a page escaped, or as JSON that a script shows through `textContent`; the page's policy lets a browser run
its own script alone, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

PALETTE = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#4d7c0f")
THUMBNAIL_SIDE = 320
_LOSSLESS_SIDE = 96  # small images are kept to the pixel

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --card: #ffffff; --page: #f8fafc;
  --accent: #2563eb; --good: #047857; --bad: #dc2626; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --card: #1f2937; --page: #111827; --accent: #60a5fa;
    --good: #34d399; --bad: #f87171; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; padding: 2rem;
  max-width: 72rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; margin: 0 0 .3rem; }
p.lead, .soft, small { color: var(--soft); } small { font-size: .83rem; display: block; }
a { color: var(--accent); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; overflow-x: auto;
  min-width: 0; }
.card + .card, .grid + .card, .card + .grid, .grid + .grid { margin-top: 1rem; } .grid > .card { margin-top: 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); margin: 1.2rem 0; }
.tiles .card { padding: .7rem .9rem; } .tiles .card + .card { margin-top: 0; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
tr:last-child > td { border-bottom: 0; }
img.picture { width: 8rem; height: 8rem; object-fit: contain; border-radius: .4rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .4rem; }
.controls { display: flex; gap: .8rem; flex-wrap: wrap; align-items: center; margin: .8rem 0; }
.controls[hidden] { display: none; }
select, input { font: inherit; padding: .25rem .5rem; color: inherit; background: var(--card); min-width: 0;
  border: 1px solid var(--line); border-radius: .4rem; }
details { margin: .6rem 0; padding: .5rem .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; overflow-x: auto; }
summary { cursor: pointer; }
svg text { fill: var(--soft); font-size: 11px; } svg .axis { stroke: var(--line); }
svg .title { fill: var(--ink); font-weight: 600; font-size: 13px; } svg .value { fill: var(--ink); }
svg .mark { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 3 3; }
code { background: var(--line); border-radius: .25rem; padding: 0 .25rem; font-size: .85em; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .8rem; align-items: center; }
.bars i, .hist i { background: var(--colour, var(--accent)); display: block; }
.bars i { height: .8rem; border-radius: .2rem; min-width: 1px; } .bars span { font-variant-numeric: tabular-nums; }
.bars span:nth-child(3n) { text-align: right; color: var(--soft); }
.hists { display: grid; gap: 1rem 1.6rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
.hist { max-width: 38rem; }
.hist .columns { display: flex; align-items: flex-end; gap: 2px; height: 5.5rem; border-bottom: 1px solid var(--line); }
.hist .columns span { flex: 1; height: 100%; display: flex; align-items: flex-end; }
.hist i { width: 100%; border-radius: .15rem .15rem 0 0; } .hist .edges { display: flex; font-size: 10px; }
.hist .edges span { flex: 1; color: var(--soft); transform: translateX(-.35em); white-space: nowrap; }
@media (max-width: 40rem) {
  body { padding: 1rem; } th, td { padding: .3rem .4rem; }
  .hist .edges span:nth-child(even) { visibility: hidden; }
}
"""


def html_page(
    title: str, lead: str, sections: Sequence[tuple[str, str]], *, style: str = "", script: str = "", top: str = ""
) -> str:
    """A whole page from a title, a sentence and (heading, HTML) sections.

    `top`: HTML between the sentence and the first section. `style`, `script`: what the page has of its own; the script
    runs when all of the page is there.
    """
    body = "".join(f"<section><h2>{escape(heading)}</h2>\n{content}</section>\n" for heading, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{top}{body}'
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text cells in a card; the first column is left-aligned."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(figures: Mapping[str, str]) -> str:
    """Figures with their names below them, side by side."""
    cells = (
        f'<div class="card"><b>{escape(value)}</b><small>{escape(name)}</small></div>'
        for name, value in figures.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def picture(encoded: bytes, *, description: str) -> str:
    """An image file as an inline image."""
    return f'<img class="picture" alt="{escape(description)}" src="{_data_uri(encoded)}">'


def thumbnail(encoded: bytes, *, name: str, side: int = THUMBNAIL_SIDE) -> tuple[str, tuple[int, int]]:
    """A copy of an image with no side longer than `side`, as a data URI, and the picture's own (width, height).

    Errors: `DataError` naming it if it cannot be decoded.
    """
    from llavamod_offline.data.images import decode_image

    image = decode_image(encoded, name=name)
    size = image.size
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) <= _LOSSLESS_SIDE else "JPEG", quality=85)
    return _data_uri(buffer.getvalue()), size


def json_block(identifier: str, content: Any) -> str:
    """JSON for the page's script, which finds it by its id; nothing in it can end the block."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="{identifier}">{text}</script>'


def _data_uri(encoded: bytes) -> str:
    kind = "png" if encoded.startswith(b"\x89PNG") else "webp" if encoded[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _policy(script: str) -> str:
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{allowed}'" if script else "'none'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
