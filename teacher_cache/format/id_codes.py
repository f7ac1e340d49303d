"""Ids as small symbols: a rank by frequency, coded in one byte for the frequent ones and two or four for the others.

A table lists a shard's most frequent ids by decreasing frequency; the other ids follow in order of id. An id's index in
that list is its *rank*. A rank below 160 is its own code. The codes 160 … 254 denote 256 ranks each, from 160 on, and
one *low* byte selects the rank. The code 255 denotes all further ranks: the excess is split into a low byte and a
*high* number of 16 bits. An entropy coder thus gets the codes as one stream of bytes, as skewed as the frequencies of
ids, and the nearly uniform low bytes as another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError

DIRECT = 160
ESCAPE = 255
FIRST_FAR = DIRECT + (ESCAPE - DIRECT) * 256

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Ranks = NDArray[np.int32]


@dataclass(frozen=True)
class CodedRanks:
    """Ranks as three streams: a code for each, a low byte for each code ≥ 160, a high number for each code 255."""

    codes: Bytes
    low: Bytes
    high: Words


def encode_ranks(ranks: Ranks) -> CodedRanks:
    """Split ranks into streams."""
    beyond = ranks >= DIRECT
    rest = ranks[beyond] - DIRECT
    far = rest >= FIRST_FAR - DIRECT
    codes = np.minimum(ranks, DIRECT).astype(np.uint8)
    codes[beyond] = np.where(far, ESCAPE, DIRECT + (rest >> 8)).astype(np.uint8)
    rest = np.where(far, rest - (FIRST_FAR - DIRECT), rest)
    return CodedRanks(codes, (rest & 255).astype(np.uint8), (rest[far] >> 8).astype(np.uint16))


_BASES = np.concatenate([np.arange(DIRECT), DIRECT + 256 * np.arange(ESCAPE - DIRECT), [FIRST_FAR]]).astype(np.int32)


def decode_ranks(coded: CodedRanks) -> Ranks:
    """Join the streams. Errors: `CacheError` if their lengths are inconsistent."""
    ranks = _BASES.take(coded.codes)
    beyond = np.flatnonzero(coded.codes >= DIRECT)
    if len(beyond) != len(coded.low):
        raise CacheError(f"{len(coded.low)} low bytes for {len(beyond)} ids")
    low = np.zeros(len(ranks), np.uint8)  # spread out first: faster than adding to a selection
    low[beyond] = coded.low
    ranks += low
    far = np.flatnonzero(coded.codes == ESCAPE)
    if len(far) != len(coded.high):
        raise CacheError(f"{len(coded.high)} high numbers for {len(far)} ids")
    ranks[far] += coded.high.astype(np.int32) << 8
    return ranks


def frequent_ids(ids: NDArray[np.int32], vocab_size: int, limit: int) -> NDArray[np.int32]:
    """At most `limit` of the ids that occur more than once, by decreasing frequency, ties by increasing id."""
    counts_V = np.bincount(ids, minlength=vocab_size)
    order_V = np.argsort(-counts_V, kind="stable")
    return order_V[: min(limit, int((counts_V > 1).sum()))].astype(np.int32)


def ids_by_rank(table: NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
    """List all ids by rank. Errors: `CacheError` if the table holds an id twice or one beyond the vocabulary."""
    rest_V = np.ones(vocab_size, np.bool_)
    if len(table) and not 0 <= int(table.min()) <= int(table.max()) < vocab_size:
        raise CacheError(f"the table of frequent ids exceeds the vocabulary of {vocab_size}")
    rest_V[table] = False
    if int(rest_V.sum()) != vocab_size - len(table):
        raise CacheError("the table of frequent ids has duplicates")
    return np.concatenate([table, np.flatnonzero(rest_V).astype(np.int32)])


def ranks_by_id(ids_V: NDArray[np.int32]) -> Ranks:
    """Invert `ids_by_rank`."""
    ranks_V = np.empty(len(ids_V), np.int32)
    ranks_V[ids_V] = np.arange(len(ids_V), dtype=np.int32)
    return ranks_V
