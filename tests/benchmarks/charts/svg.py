"""What the charts share: the document, the placement of a panel in it, and the legend below."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

TOP = 34
_CHARACTER = 5.9  # mean width of a character in the legend


def document(panels: Iterable[str], legend: Iterable[tuple[str, str]], *, width: int, height: int, left: int) -> str:
    """A chart of panels of equal height above a legend of (text, colour)."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + TOP + 76}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{"".join(panels)}{_legend(legend, left, height)}</svg>\n'
    )


def panel(parts: Iterable[str], left: int) -> str:
    """The elements of a panel, moved into place."""
    return f'<g transform="translate({left} {TOP})">\n' + "\n".join(parts) + "\n</g>\n"


def _legend(entries: Iterable[tuple[str, str]], left: int, height: int) -> str:
    parts, x = [], float(left)
    for text, colour in entries:
        parts.append(
            f'<circle cx="{x:.0f}" cy="-4" r="4" fill="{colour}"/><text x="{x + 9:.0f}" y="0">{escape(text)}</text>'
        )
        x += 26 + _CHARACTER * len(text)
    return f'<g transform="translate(0 {TOP + height + 60})">{"".join(parts)}</g>\n'
