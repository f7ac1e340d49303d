"""Rankings of the most unusual sequences: uncertain, unlikely, large tails, long, and images that are not needed.

Shape suffixes: Q all sequences of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.scan import Scan

Doubles = NDArray[np.float64]
NEEDED = 0.5  # nats of visual advantage; an answer needs its image if some token has as much


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
    rankings = [
        _ranking(cache, "entropy", "The most uncertain", "mean entropy, nats per token", entropy_Q, "{:.3f}", count),
        _ranking(cache, "unlikely", "The least likely", "log-prob, nats per token", -log_prob_Q, "−{:.3f}", count),
        _ranking(cache, "tail", "The largest tails", "mean mass outside the top-k", tail_Q, "{:.4f}", count),
        _ranking(cache, "longest", "The longest", "tokens", tokens_Q, "{:,.0f}", count),
    ]
    return [*rankings, _unneeded_images(cache, scan, count)] if cache.has_advantages else rankings


def unneeded_images(scan: Scan) -> NDArray[np.int64]:
    """The scanned sequences in which no token gains `NEEDED` nats from the image, least first: rows of the cache."""
    found = np.flatnonzero(scan.image_Q < NEEDED)
    rows: NDArray[np.int64] = scan.rows_Q[found[np.argsort(scan.image_Q[found], kind="stable")]]
    return rows


def _unneeded_images(cache: TeacherCache, scan: Scan, count: int) -> Ranking:
    rows = unneeded_images(scan)[:count].tolist()
    image_Q = _spread(scan.image_Q, scan, len(cache))
    texts = tuple(f"{image_Q[row]:+.3f}".replace("-", "−") for row in rows)
    note = f"no token gains {NEEDED:g} nats from the image; the most that one gains"
    measured = int((~np.isnan(image_Q)).sum())
    return Ranking("unneeded", "Images not needed", note, measured, tuple(cache.items(rows)), texts)


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
