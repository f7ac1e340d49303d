"""Records → `SparseTargets`, the padded tensors that losses take.

Shape suffixes: N positions, K and M the largest numbers of top-k ids and tail samples of a position.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from teacher_cache.format.record import Records
from teacher_cache.format.top_k_codes import starts


def sparse_targets(
    records: Records, temperatures: tuple[float, ...], vocab_size: int, sampled_at: float = 1.0
) -> SparseTargets:
    """Pad records to the most top-k ids and tail samples, as CPU tensors, ids of 32 bits; samples weigh equally."""
    topk_width, topk_places = _places(records.topk_counts_N)
    tail_width, tail_places = _places(records.tail_counts_N)
    rows = len(records)
    drawn_NM = np.arange(tail_width) < records.tail_counts_N[:, None]
    weights_N = (1 / np.maximum(records.tail_counts_N, 1)).astype(np.float32)
    return SparseTargets(
        topk_ids_NK=_padded(records.topk_ids_H, topk_places, rows, topk_width, EMPTY_ID),
        topk_log_probs_NK=_padded(records.topk_log_probs_H, topk_places, rows, topk_width, float("-inf")),
        tail_log_mass_N=_tensor(records.tail_log_mass_N).float(),
        tail_ids_NM=_padded(records.tail_ids_D, tail_places, rows, tail_width, EMPTY_ID),
        tail_weights_NM=torch.from_numpy(drawn_NM * weights_N[:, None]),
        target_ids_N=_tensor(records.target_ids_N).long(),
        target_log_probs_N=_tensor(records.target_log_probs_N).float(),
        entropy_N=_tensor(records.entropy_N).float(),
        log_normalisers_NS=_tensor(records.log_normalisers_NS).float(),
        temperatures=temperatures,
        vocab_size=vocab_size,
        sampled_at=sampled_at,
    )


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _places(counts_N: NDArray[np.int32]) -> tuple[int, NDArray[np.int64]]:
    """The width of a padded table, and the index of each entry in its flattened form."""
    width = int(counts_N.max()) if len(counts_N) else 0
    gaps_N = np.arange(len(counts_N)) * width - starts(counts_N)
    places = np.repeat(gaps_N, counts_N)
    places += np.arange(len(places))
    return width, places


def _padded(values: NDArray[Any], places: NDArray[np.int64], rows: int, width: int, empty: float) -> Tensor:
    table = np.full(rows * width, empty, values.dtype)
    table[places] = values
    return torch.from_numpy(table.reshape(rows, width))
