"""The entropy of a cache's contents: the bytes that an ideal coder of single symbols would need.

Each kind of symbol counts with the entropy of its own frequencies in this cache, without context or repetition. A
position's tail samples are a set, so their order is not counted. What cannot be compressed (hashes, checksums) counts
in full.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.columns import ColumnFile
from teacher_cache.format.manifest import COLUMNS_NAME, SEQUENCES_NAME, SHARDS_NAME
from teacher_cache.read.reader import TeacherCache

_NUMBERS = ("head_counts", "draw_counts", "target_slots", "entropy", "head_first", "outside_log_probs")


def floor_bytes(cache: TeacherCache) -> float:
    """The entropy in bytes per position."""
    bits = 0.0
    for name in cache.shard_names:
        folder = Path(cache.path) / SHARDS_NAME / name
        bits += 8 * (folder / SEQUENCES_NAME).stat().st_size + _shard_bits(ColumnFile(folder / COLUMNS_NAME))
    return bits / 8 / cache.positions


def _shard_bits(file: ColumnFile) -> float:
    blocks, records = file.columns(0, file.blocks), file.records(0, file.blocks)
    ids = np.concatenate([piece.topk_ids_H for piece in records])
    if file.codec.forced_ids:  # forced ids at the end of the top-k need no id
        pairs = zip(records, blocks, strict=True)
        ids = ids[np.concatenate([_likely(piece.topk_counts_N, block["head_counts"]) for piece, block in pairs])]
    bits = entropy_bits(ids)
    draws = np.concatenate([piece.tail_ids_D for piece in records])
    counts = np.concatenate([piece.tail_counts_N for piece in records])
    bits += entropy_bits(draws) - _order_bits(draws, counts)
    for block, piece in zip(blocks, records, strict=True):
        bits += entropy_bits(piece.target_ids_N[block["target_slots"] == 0])
    for name in _NUMBERS:
        bits += entropy_bits(np.concatenate([block[name] for block in blocks]))
    steps = [block["head_steps"].astype(np.int64) for block in blocks]
    for block, step in zip(blocks, steps, strict=True):
        step[step == 255] = block["head_far_steps"]
    bits += entropy_bits(np.concatenate(steps))
    for name in ("tail_shares", "forced_log_probs"):
        if name in blocks[0]:
            bits += sum(entropy_bits(row) for row in np.concatenate([block[name] for block in blocks], axis=1))
    return bits


def entropy_bits(symbols: NDArray[Any]) -> float:
    """The number of symbols times the entropy of their frequencies."""
    if not len(symbols):
        return 0.0
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / len(symbols))).sum())


def _likely(counts_N: NDArray[np.int32], likely_N: NDArray[Any]) -> NDArray[np.bool_]:
    starts_N = np.cumsum(counts_N) - counts_N
    place_H = np.arange(int(counts_N.sum())) - np.repeat(starts_N, counts_N)
    return np.asarray(place_H < np.repeat(likely_N.astype(np.int64), counts_N))


def _order_bits(draws_D: NDArray[np.int32], counts_N: NDArray[np.int32]) -> float:
    """log2 of the number of orderings of each position's tail samples: m! over the repeats' factorials, summed."""
    log2_factorial = np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, max(int(counts_N.max(initial=1)), 1) + 1)))])
    row_D = np.repeat(np.arange(len(counts_N)), counts_N)
    _, repeats = np.unique(row_D * (int(draws_D.max(initial=0)) + 1) + draws_D, return_counts=True)
    return float(log2_factorial[counts_N].sum() - log2_factorial[repeats].sum())
