"""Log-probs of top-k ids as small symbols: the code of the first, then the steps from one to the next.

Likely ids are sorted by decreasing log-prob, so their codes rise; the steps between them are ≥ 0 and mostly small: one
byte each, where 255 refers to the *far steps* of 16 bits. Forced ids that are not among the likely ids need no stored
id: they come last, in the order of the list, each with a code for its log-prob.

Shape suffixes: N positions, H top-k ids of all positions, P the likely ones of them, F forced ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError

FAR = 255

Ints = NDArray[np.int32]
Words = NDArray[np.uint16]


@dataclass(frozen=True)
class Steps:
    """Rising codes of all positions: the first code of each, and the steps after it."""

    first_N: Words
    near: NDArray[np.uint8]
    far: Words


def encode_steps(codes_P: Words, counts_N: Ints) -> Steps:
    """Turn the rising codes of each position into steps; every position has at least one code."""
    starts_N = starts(counts_N)
    steps_P = np.diff(codes_P.astype(np.int32), prepend=0)
    later_P = np.ones(len(codes_P), np.bool_)
    later_P[starts_N] = False
    steps = steps_P[later_P]
    far = steps >= FAR
    return Steps(codes_P[starts_N], np.where(far, FAR, steps).astype(np.uint8), steps[far].astype(np.uint16))


def decode_steps(steps: Steps, counts_N: Ints) -> Ints:
    """Decode the codes of all positions. Errors: `CacheError` if the streams have unequal lengths."""
    total = int(counts_N.sum())
    if len(steps.near) != total - len(counts_N):
        raise CacheError(f"{len(steps.near)} steps for {total - len(counts_N)} entries")
    starts_N = starts(counts_N)
    later_P = np.ones(total, np.bool_)
    later_P[starts_N] = False
    near_P = np.zeros(total, np.uint8)
    near_P[later_P] = steps.near
    steps_P = near_P.astype(np.int32)
    far = np.flatnonzero(near_P == FAR)
    if len(far) != len(steps.far):
        raise CacheError(f"{len(steps.far)} far steps for {len(far)} entries")
    steps_P[far] = steps.far
    # One running sum over all positions, shifted so that each begins with its own first code.
    codes_P = np.cumsum(steps_P, dtype=np.int32)
    codes_P += np.repeat(steps.first_N - codes_P[starts_N], counts_N)
    return codes_P


def forced_suffix(ids_H: Ints, counts_N: Ints, forced_by_id_V: NDArray[np.uint8]) -> Ints:
    """Count the forced ids at the end of each position's top-k ids, in the order of the list.

    `forced_by_id_V`: 1 + an id's index among the forced ids, 0 for all others. The first entry is never counted.
    """
    ends_N = np.cumsum(counts_N)
    suffix_N = np.zeros(len(counts_N), np.int32)
    before_N = np.full(len(counts_N), 256, np.int32)
    open_N = np.ones(len(counts_N), np.bool_)
    for step in range(int(forced_by_id_V.max(initial=0))):
        open_N &= counts_N > step + 1
        place_N = forced_by_id_V[ids_H[np.where(open_N, ends_N - 1 - step, 0)]].astype(np.int32)
        open_N &= (place_N > 0) & (place_N < before_N)
        suffix_N += open_N
        before_N = np.where(open_N, place_N, before_N)
    return suffix_N


def missing_forced(ids_P: Ints, counts_N: Ints, forced_by_id_V: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which forced ids are missing from each position's likely ids [N, F]."""
    places_P = forced_by_id_V.take(ids_P)
    hits = np.flatnonzero(places_P)
    rows = np.searchsorted(np.cumsum(counts_N), hits, side="right")
    missing_NF = np.ones((len(counts_N), int(forced_by_id_V.max(initial=0))), np.bool_)
    missing_NF[rows, places_P[hits] - 1] = False
    return missing_NF


def starts(counts_N: Ints) -> NDArray[np.int64]:
    """Where the entries of each position begin."""
    return np.cumsum(counts_N, dtype=np.int64) - counts_N
