"""The figures of a report as HTML: totals, distributions by source, rankings, bytes by part, the fingerprint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.pages.charts import bar_list, histograms
from llavamod_offline.pages.page import html_table, tiles
from teacher_cache.inspection.summary import bytes_by_part
from teacher_cache.inspection.terminal import readable_bytes
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.rankings import Ranking
from teacher_cache.report.scan import Scan

# The first ends where a coarse cache, which rounds to 1/16 of a nat, says 0.
ENTROPY_EDGES = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, math.inf)
HEAD_MASS_EDGES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
_FAR = 1e9  # stands for no end
_GROUPS = 8
_OTHERS = "all other sources"


def total_tiles(cache: TeacherCache, scan: Scan) -> str:
    """Totals and means, side by side."""
    positions = max(cache.positions, 1)
    chosen_N = scan.chosen_N[~np.isnan(scan.chosen_N)]
    figures = {
        "positions": f"{cache.positions:,}",
        "sequences": f"{len(cache):,}",
        "sequences rejected": f"{cache.totals['rejected']:,}",
        "in all": readable_bytes(cache.bytes),
        "bytes a position": f"{cache.bytes_per_position:.1f}",
        "ids in a head": f"{cache.totals['heads'] / positions:.1f}",
        "draws from a tail": f"{cache.totals['draws'] / positions:.1f}",
        "nats, mean entropy": _mean(scan.entropy_N, "{:.3f}"),
        "mean mass of the head": _mean(scan.topk_mass_N, "{:.4f}"),
        "of tokens are the teacher's first choice": _mean(chosen_N, "{:.1%}"),
    }
    return tiles(figures)


def distributions(cache: TeacherCache, scan: Scan, by_source: bool) -> str:
    """Entropy and head mass by source: histograms, and a table with what else tells sources apart."""
    if not len(scan.entropy_N):
        return '<p class="soft">The cache holds no positions.</p>'
    groups = _folded(scan)
    scanned, every = len(scan.entropy_N), cache.positions
    over = f"all {every:,} positions" if scanned == every else f"{scanned:,} of {every:,} positions, evenly spaced"
    if not by_source:
        over += "; name the packed set with --data to see them by source"
    charts = []
    for title, values_N, edges in (
        ("Entropy, nats", scan.entropy_N, ENTROPY_EDGES),
        ("Mass of the head", scan.topk_mass_N, HEAD_MASS_EDGES),
    ):
        finite = [*edges[:-1], min(edges[-1], _FAR)]
        series = {}
        for name, where in groups.items():
            inside_N = np.clip(values_N[where], 0.0, finite[-1])  # rounding may lead a hair beyond
            counts = np.histogram(inside_N, finite)[0]
            series[name] = (counts.tolist(), f"mean {values_N[where].mean():.4f}")
        charts.append(histograms(title, f"Share of positions in each range; {over}.", edges, series))
    header = ["source", "positions", "entropy: mean", "median", "90 %", "head mass", "log p", "first choice"]
    rows = [[name, *_row(scan, where)] for name, where in groups.items()]
    both = "".join(charts)
    return (f'<div class="halves">{both}</div>' if len(groups) == 1 else both) + html_table(header, rows)


def _folded(scan: Scan) -> dict[str, NDArray[np.bool_]]:
    """Which positions each group has; the smallest groups together where there are many."""
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


def ranking_cards(cache: TeacherCache, rankings: Sequence[Ranking]) -> str:
    """The first sequences of each ranking, which lead to their cards."""
    cards, sequences, several = [], len(cache), len(cache.roles) > 1
    for ranking in rankings:
        rows = "".join(
            f'<tr><td><a href="#s-{escape(key)}">{escape(key)}</a>'
            f"{f' <span class=soft>{escape(role)}</span>' if several else ''}</td><td>{escape(value)}</td></tr>"
            for (key, role), value in zip(ranking.items, ranking.values, strict=True)
        )
        of = f"of {'all' if ranking.of == sequences else f'{ranking.of:,} of'} {sequences:,} sequences"
        cards.append(
            f'<div class="card"><h3>{escape(ranking.title)}</h3><small>{escape(ranking.note)}; {of}</small>'
            f"<table>{rows}</table></div>"
        )
    return f'<div class="grid rankings">{"".join(cards)}</div>'


def byte_bars(cache: TeacherCache) -> str:
    """What the bytes of the cache go to."""
    parts = bytes_by_part(cache)
    total = max(sum(parts.values()), 1)
    positions = max(cache.positions, 1)
    bars = [(name, float(size), f"{size / positions:.2f} · {size / total:.1%}") for name, size in parts.items()]
    return bar_list("Bytes a position by part, and the part's share", bars)


def fingerprint_fields(cache: TeacherCache) -> str:
    """Every field of the fingerprint, to be unfolded."""
    rows = [["cache", cache.path], ["digest", cache.digest], *_fields(cache.fingerprint, "")]
    body = "".join(f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return f"<details><summary>Every field of the fingerprint</summary><table>{body}</table></details>"


def _fields(tree: Any, name: str) -> list[list[str]]:
    if isinstance(tree, dict):
        return [row for key, value in tree.items() for row in _fields(value, f"{name}.{key}" if name else str(key))]
    return [[name, ", ".join(map(str, tree)) if isinstance(tree, list) else str(tree)]]


def _mean(values: NDArray[np.float64], form: str) -> str:
    return form.format(values.mean()) if len(values) else "–"
