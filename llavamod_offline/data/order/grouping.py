"""Batches of samples of similar length, or of one of two kinds, within a window of the stream.

Shape suffixes: N samples; a *place* is a sample's number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.order.hashes import BATCHES, hashes

Rows = NDArray[np.int64]

_GROUPED_BATCHES = 64  # this many batches are sorted by length together


def grouped(
    places: Rows,
    lengths_N: NDArray[np.integer] | None,
    kinds_N: NDArray[np.bool_] | None,
    *,
    size: int,
    start: int,
    seed: int,
) -> Rows:
    """Group a window's shuffled places, which begin at element `start` of the stream, into batches of `size`.

    With lengths, every 64 complete batches are sorted by length; with kinds, each batch is of one kind, except one with
    the remainder of both. The batches are then shuffled. Without either, the places are returned as they are.
    """
    if lengths_N is None and kinds_N is None:
        return places
    first = -start % size
    batches = max(0, len(places) - first) // size
    inside = places[first : first + batches * size]
    chunks = [
        part[begin : begin + _GROUPED_BATCHES * size]
        for part in ([inside] if kinds_N is None else _by_kind(inside, kinds_N, size))
        for begin in range(0, len(part), _GROUPED_BATCHES * size)
    ]
    if lengths_N is not None:
        chunks = [by_length(chunk, lengths_N) for chunk in chunks]
    shuffled = np.argsort(hashes((start + first) // size + np.arange(batches), seed, 0, BATCHES))
    inside = np.concatenate([inside[:0], *chunks]).reshape(batches, size)[shuffled].ravel()
    return np.concatenate([places[:first], inside, places[first + batches * size :]])


def _by_kind(places: Rows, kinds_N: NDArray[np.bool_], size: int) -> list[Rows]:
    """The places of each kind that fill whole batches, and the remainder of both."""
    kinds = [places[kinds_N[places]], places[~kinds_N[places]]]
    whole = [kind[: len(kind) // size * size] for kind in kinds]
    return [*whole, np.concatenate([kind[len(part) :] for kind, part in zip(kinds, whole, strict=True)])]


def by_length(places: Rows, lengths_N: NDArray[np.integer]) -> Rows:
    """Sort places by decreasing length."""
    ordered: Rows = places[np.argsort(-lengths_N[places].astype(np.int64), kind="stable")]
    return ordered
