"""The image of the experts' load over training: a band of rows for each sparse layer, a row for each expert.

Shape suffixes: C columns (spans of logged steps), L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

_COLUMNS = 96
_LEFT, _WIDTH, _CELL_HEIGHT, _GAP, _FOOT = 54, 768, 10, 6, 20
_UNDER, _OVER = (37, 99, 235), (217, 119, 6)  # blue: less than its share; orange: more


def expert_load_picture(entries: Sequence[dict[str, Any]], *, title: str) -> str:
    """An SVG in a card, from the log entries that have `expert_load`; nothing if none has.

    A cell's colour is the load over the even share 1/E: white at it, full blue at 0, full orange at twice it or more.
    """
    logged = [entry for entry in entries if entry.get("expert_load")]
    if not logged:
        return ""
    spans = np.array_split(np.arange(len(logged)), min(len(logged), _COLUMNS))
    loads_CLE = np.stack([np.mean([logged[index]["expert_load"] for index in span], axis=0) for span in spans])
    columns, layers, experts = loads_CLE.shape
    cell, band = _WIDTH / columns, experts * _CELL_HEIGHT + _GAP
    width, height = _LEFT + _WIDTH, layers * band + _FOOT
    parts = []
    for layer in range(layers):
        y = layer * band
        parts.append(f'<text x="0" y="{y + experts * _CELL_HEIGHT / 2 + 4:.0f}">layer {layer + 1}</text>')
        for expert in range(experts):
            for column, span in enumerate(spans):
                load = float(loads_CLE[column, layer, expert])
                steps = f"step {logged[span[0]]['step']}"
                if len(span) > 1:
                    steps += f" to {logged[span[-1]]['step']}"
                parts.append(
                    f'<rect x="{_LEFT + column * cell:.2f}" y="{y + expert * _CELL_HEIGHT}" width="{cell + 0.2:.2f}" '
                    f'height="{_CELL_HEIGHT}" fill="{_colour(load * experts)}"><title>'
                    f"{escape(f'sparse layer {layer + 1}, expert {expert + 1}, {steps}: {load:.1%} of the choices')}"
                    "</title></rect>"
                )
    for x, entry, anchor in ((_LEFT, logged[0], "start"), (width, logged[-1], "end")):
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">step {entry["step"]}</text>')
    return (
        f'<div class="card"><h3>{escape(title)}</h3><small>Share of the tokens’ choices; a row is an expert. White: '
        f"its even share of {1 / experts:.0%}; blue: less; orange: more, full at twice that.</small><br>"
        f'<svg role="img" aria-label="load of the experts over training" viewBox="0 0 {width} {height}" width="100%" '
        f'style="min-width:32rem">{"".join(parts)}</svg></div>'
    )


def _colour(relative_load: float) -> str:
    end, share = (_UNDER, 1 - relative_load) if relative_load < 1 else (_OVER, relative_load - 1)
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(255 + (channel - 255) * share):02x}" for channel in end)
