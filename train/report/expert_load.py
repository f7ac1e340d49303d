"""Data of the expert load charts: for each sparse layer, rows of experts over columns of logged steps.

Shape suffixes: C columns (spans of logged steps), L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_COLUMNS = 96
_UNDER, _OVER = (37, 99, 235), (217, 119, 6)  # blue: below the even share; orange: above


def expert_load(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Cells (expert, column, colour, label) by layer, from the log entries with `expert_load`; None if none has it.

    The colour shows the load relative to the even share 1/E: white when equal, full blue at 0, full orange at twice
    the share or more.
    """
    logged = [entry for entry in entries if entry.get("expert_load")]
    if not logged:
        return None
    spans = np.array_split(np.arange(len(logged)), min(len(logged), _COLUMNS))
    loads_CLE = np.stack([np.mean([logged[index]["expert_load"] for index in span], axis=0) for span in spans])
    columns, layers, experts = loads_CLE.shape
    steps = [
        f"step {logged[span[0]]['step']}" + (f" to {logged[span[-1]]['step']}" if len(span) > 1 else "")
        for span in spans
    ]
    cells = [
        [
            (
                expert,
                column,
                _colour(load * experts),
                f"expert {expert + 1}, {steps[column]}: {load:.1%} of the choices",
            )
            for (column, expert), load in np.ndenumerate(loads_CLE[:, layer])
        ]
        for layer in range(layers)
    ]
    ends = (logged[0]["step"], logged[-1]["step"])
    return {"columns": columns, "experts": experts, "layers": cells, "ends": ends}


def _colour(relative_load: float) -> str:
    end, share = (_UNDER, 1 - relative_load) if relative_load < 1 else (_OVER, relative_load - 1)
    return "#" + "".join(f"{round(255 + (channel - 255) * min(share, 1.0)):02x}" for channel in end)
