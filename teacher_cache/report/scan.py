"""Figures over the positions of a cache: all of them, or those of evenly spaced sequences.

Shape suffixes: Q sequences scanned, N their positions (P of them with a target), H top-k entries, D tail samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.progress import ProgressBar
from teacher_cache.format.record import Records
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.sets import CacheSets
from teacher_cache.visual.advantages import decode_advantages

EVERYTHING = "all positions"
_WITHOUT_TARGET = ", no target"
_TOPK_ENTRIES = 50_000_000  # the most to decode; limits caches of whole distributions
_BATCH_SEQUENCES = 64
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Scan:
    """Figures of the scanned positions. `groups`: the sources, largest first; positions without a target are separate.

    `entropy_N` in nats; `topk_mass_N`; `group_N` indexes `groups`. Means over a sequence's positions with a target:
    `entropy_Q`, `log_prob_Q`, `tail_Q` (NaN without any). `surprise_N` is −log p of the target and
    `chosen_N` whether it is the teacher's first choice (NaN where there is no target). `image_Q`: the largest visual
    advantage of a sequence's tokens, in nats (NaN without any).
    """

    rows_Q: NDArray[np.int64]
    groups: tuple[str, ...]
    group_N: NDArray[np.int64]
    entropy_N: Doubles
    topk_mass_N: Doubles
    surprise_N: Doubles
    chosen_N: Doubles
    entropy_Q: Doubles
    log_prob_Q: Doubles
    tail_Q: Doubles
    image_Q: Doubles


def scan_cache(cache: TeacherCache, sets: CacheSets, most_positions: int) -> Scan:
    """Decode all sequences, or evenly spaced ones with about `most_positions`. Errors: `CacheError`."""
    width = cache.totals["heads"] / max(cache.positions, 1)
    most = max(1, min(most_positions, int(_TOPK_ENTRIES / max(width, 1.0))))
    step = max(1, math.ceil(cache.positions / most))
    rows_Q = np.arange(0, len(cache), step)
    items = cache.items(rows_Q.tolist())
    names = sets.sources(items) if sets else [EVERYTHING] * len(items)
    columns: list[list[Doubles]] = [[] for _ in range(5)]
    lengths: list[int] = []
    codes: list[NDArray[np.uint8]] = []
    with ProgressBar("read", len(items), "sequence") as bar:
        for start in range(0, len(items), _BATCH_SEQUENCES):
            batch = items[start : start + _BATCH_SEQUENCES]
            lengths += [cache.sequence(*item).n_positions for item in batch]
            for column, values_N in zip(columns, _figures(cache.records(batch)), strict=True):
                column.append(values_N)
            if cache.has_advantages:
                codes.append(cache.advantage_codes(batch))
            bar.advance(len(batch))
    entropy_N, topk_mass_N, tail_N, surprise_N, chosen_N = (np.concatenate([np.zeros(0), *found]) for found in columns)
    owner_N = np.repeat(np.arange(len(items)), lengths)
    target_N = ~np.isnan(surprise_N)
    with np.errstate(invalid="ignore"):
        counts_Q = np.bincount(owner_N[target_N], minlength=len(items)).astype(np.float64)
        entropy_Q, log_prob_Q, tail_Q = (
            np.bincount(owner_N[target_N], weights=values_N[target_N], minlength=len(items)) / counts_Q
            for values_N in (entropy_N, -surprise_N, tail_N)
        )
    groups, group_N = _grouped(names, owner_N, target_N)
    image_Q = np.full(len(items), np.nan)
    if codes:
        np.fmax.at(image_Q, owner_N, decode_advantages(np.concatenate(codes)))
    return Scan(
        rows_Q, groups, group_N, entropy_N, topk_mass_N, surprise_N, chosen_N, entropy_Q, log_prob_Q, tail_Q, image_Q
    )


def _figures(records: Records) -> tuple[Doubles, ...]:
    """Entropy, mass of top-k and of tail, −log p of the target, and whether the target is the top token, [N] each."""
    tail_N = np.exp(records.tail_log_mass_N.astype(np.float64))
    target_N = records.target_ids_N != NO_TARGET
    firsts_N = np.cumsum(records.topk_counts_N) - records.topk_counts_N
    surprise_N = np.where(target_N, -records.target_log_probs_N.astype(np.float64), np.nan)
    chosen_N = np.where(target_N, records.topk_ids_H[firsts_N] == records.target_ids_N, np.nan)
    return records.entropy_N.astype(np.float64), 1.0 - tail_N, tail_N, surprise_N, chosen_N


def _grouped(
    names: list[str], owner_N: NDArray[np.int64], target_N: NDArray[np.bool_]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The groups, by decreasing number of positions, and the group of each position."""
    sources = sorted(set(names))
    codes_Q = np.array([sources.index(name) for name in names], np.int64)
    codes_N = codes_Q[owner_N] * 2 + ~target_N
    counts = np.bincount(codes_N, minlength=2 * len(sources))
    order = [code for code in np.argsort(-counts, kind="stable").tolist() if counts[code]]
    place = np.zeros(2 * len(sources), np.int64)
    place[order] = np.arange(len(order))
    return tuple(sources[code // 2] + _WITHOUT_TARGET * (code % 2) for code in order), place[codes_N]
