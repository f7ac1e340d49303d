"""The figures of a report: totals, distributions by source, bytes by part, the fingerprint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.pages.charts import histograms
from teacher_cache.fingerprint import without_tokens
from teacher_cache.inspection.summary import bytes_by_part
from teacher_cache.inspection.terminal import readable_bytes
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.scan import Scan

# The first bin covers what a coarse cache, which rounds to 1/16 of a nat, stores as 0.
ENTROPY_EDGES = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, math.inf)
TOPK_MASS_EDGES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
_FAR = 1e9  # stands for infinity
_GROUPS = 8
_OTHERS = "all other sources"
_HEADER = ("source", "positions", "entropy: mean", "median", "90 %", "top-k mass", "log p", "first choice")


def totals(cache: TeacherCache, scan: Scan) -> dict[str, str]:
    """Totals and means."""
    positions = max(cache.positions, 1)
    chosen_N = scan.chosen_N[~np.isnan(scan.chosen_N)]
    return {
        "positions": f"{cache.positions:,}",
        "sequences": f"{len(cache):,}",
        "sequences rejected": f"{cache.totals['rejected']:,}",
        "total size": readable_bytes(cache.bytes),
        "bytes per position": f"{cache.bytes_per_position:.1f}",
        "top-k ids per position": f"{cache.totals['heads'] / positions:.1f}",
        "tail samples per position": f"{cache.totals['draws'] / positions:.1f}",
        "nats, mean entropy": _mean(scan.entropy_N, "{:.3f}"),
        "mean top-k mass": _mean(scan.topk_mass_N, "{:.4f}"),
        "of tokens are the teacher's first choice": _mean(chosen_N, "{:.1%}"),
    }


def distributions(cache: TeacherCache, scan: Scan, by_source: bool) -> dict[str, Any]:
    """Entropy and top-k mass by source: histograms by title, table rows, and what they cover."""
    groups = _folded(scan) if len(scan.entropy_N) else {}
    scanned, every = len(scan.entropy_N), cache.positions
    over = f"all {every:,} positions" if scanned == every else f"{scanned:,} of {every:,} positions, evenly spaced"
    if not by_source:
        over += "; pass the packed set with --data to see them by source"
    panels = {}
    for title, values_N, edges in (
        ("Entropy, nats", scan.entropy_N, ENTROPY_EDGES),
        ("Top-k mass", scan.topk_mass_N, TOPK_MASS_EDGES),
    ):
        finite = [*edges[:-1], min(edges[-1], _FAR)]
        series = {}
        for name, where in groups.items():
            inside_N = np.clip(values_N[where], 0.0, finite[-1])  # rounding may exceed the range slightly
            counts = np.histogram(inside_N, finite)[0]
            series[name] = (counts.tolist(), f"mean {values_N[where].mean():.4f}")
        panels[title] = histograms(edges, series)
    rows = [[name, *_row(scan, where)] for name, where in groups.items()]
    return {"histograms": panels, "over": over, "header": _HEADER, "groups": rows}


def _folded(scan: Scan) -> dict[str, NDArray[np.bool_]]:
    """A mask of positions per group; beyond `_GROUPS`, the smallest are merged."""
    names = list(scan.groups)
    several = len(names) > _GROUPS
    groups = {name: scan.group_N == place for place, name in enumerate(names[: _GROUPS - 1] if several else names)}
    if several:
        groups[f"{_OTHERS} ({len(names) - _GROUPS + 1})"] = scan.group_N >= _GROUPS - 1
    return groups


def _row(scan: Scan, where: NDArray[np.bool_]) -> list[str]:
    entropy_N, surprise_N, chosen_N = scan.entropy_N[where], scan.surprise_N[where], scan.chosen_N[where]
    target_N = ~np.isnan(surprise_N)
    return [
        f"{len(entropy_N):,}",
        f"{entropy_N.mean():.3f}",
        *(f"{value:.3f}" for value in np.quantile(entropy_N, [0.5, 0.9])),
        f"{scan.topk_mass_N[where].mean():.4f}",
        f"−{surprise_N[target_N].mean():.3f}" if target_N.any() else "–",
        f"{chosen_N[target_N].mean():.1%}" if target_N.any() else "–",
    ]


def bytes_per_part(cache: TeacherCache) -> list[tuple[str, float, str]]:
    """(part, bytes, text) of the parts of the cache."""
    parts = bytes_by_part(cache)
    total, positions = max(sum(parts.values()), 1), max(cache.positions, 1)
    return [(name, float(size), f"{size / positions:.2f} · {size / total:.1%}") for name, size in parts.items()]


def fingerprint_fields(cache: TeacherCache) -> list[list[str]]:
    """(name, value) of every field of the fingerprint, after path and digest."""
    return [["cache", cache.path], ["digest", cache.digest], *_fields(without_tokens(cache.fingerprint), "")]


def _fields(tree: Any, name: str) -> list[list[str]]:
    if isinstance(tree, dict):
        return [row for key, value in tree.items() for row in _fields(value, f"{name}.{key}" if name else str(key))]
    return [[name, ", ".join(map(str, tree)) if isinstance(tree, list) else str(tree)]]


def _mean(values: NDArray[np.float64], form: str) -> str:
    return form.format(values.mean()) if len(values) else "–"
