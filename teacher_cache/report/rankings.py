"""Rankings of the most unusual sequences: uncertain, unlikely, large tails, long.

Shape suffixes: Q all sequences of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.scan import Scan

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """The first sequences by one figure. `slug` identifies it in the page; `of` counts the sequences that have it."""

    slug: str
    title: str
    note: str
    of: int
    items: tuple[tuple[str, str], ...]
    values: tuple[str, ...]


def rank(cache: TeacherCache, scan: Scan, count: int) -> list[Ranking]:
    """Highest mean entropy, least likely answers, largest tails, most tokens; `count` sequences each.

    In a cache of response positions the sequence table has all figures but the tails, so all sequences are ranked;
    figures that the table lacks rank only the scanned sequences.
    """
    tokens_Q = cache.numbers("n_tokens").astype(np.float64)
    entropy_Q, log_prob_Q, tail_Q = (
        _spread(values_Q, scan, len(cache)) for values_Q in (scan.entropy_Q, scan.log_prob_Q, scan.tail_Q)
    )
    if cache.positions_kept == "response":
        positions_Q = cache.numbers("n_position").astype(np.float64)
        positions_Q[positions_Q == 0] = np.nan
        entropy_Q = np.where(np.isnan(positions_Q), np.nan, cache.numbers("mean_entropy"))
        log_prob_Q = cache.numbers("sum_log_prob") / positions_Q
    return [
        _ranking(cache, "entropy", "The most uncertain", "mean entropy, nats per token", entropy_Q, "{:.3f}", count),
        _ranking(cache, "unlikely", "The least likely", "log-prob, nats per token", -log_prob_Q, "−{:.3f}", count),
        _ranking(cache, "tail", "The largest tails", "mean mass outside the top-k", tail_Q, "{:.4f}", count),
        _ranking(cache, "longest", "The longest", "tokens", tokens_Q, "{:,.0f}", count),
    ]


def _ranking(
    cache: TeacherCache, slug: str, title: str, note: str, values_Q: Doubles, form: str, count: int
) -> Ranking:
    above = np.flatnonzero(values_Q > 0)  # an entropy or a tail of 0 is not unusual
    rows = above[np.argsort(-values_Q[above], kind="stable")[:count]]
    texts = tuple(form.format(values_Q[row]) for row in rows)
    return Ranking(slug, title, note, int((~np.isnan(values_Q)).sum()), tuple(cache.items(rows.tolist())), texts)


def _spread(values: Doubles, scan: Scan, size: int) -> Doubles:
    spread_Q = np.full(size, np.nan)
    spread_Q[scan.rows_Q] = values
    return spread_Q
