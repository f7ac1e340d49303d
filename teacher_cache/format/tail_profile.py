"""The tail profile: the teacher's mean tail over all positions, estimated from tail samples.

A shard stores it for its frequent ids, plus one number for all other ids, which are treated as uniform.

Shape suffixes: V ids, F frequent ids, D tail samples of all positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.record import Records


def mean_tail(records: Records, frequent_F: NDArray[np.int32], vocab_size: int) -> NDArray[np.float32]:
    """Mean tail mass of each frequent id, and of all others together [F + 1]; samples of a tail share its mass."""
    mass_N = np.exp(records.tail_log_mass_N.astype(np.float64)) / np.maximum(records.tail_counts_N, 1)
    mass_D = np.repeat(mass_N, records.tail_counts_N)
    sums_V = np.bincount(records.tail_ids_D, weights=mass_D, minlength=vocab_size)
    frequent = sums_V[frequent_F]
    return (np.append(frequent, sums_V.sum() - frequent.sum()) / max(len(records), 1)).clip(min=0).astype(np.float32)


def spread(mean: NDArray[np.float32], frequent_F: NDArray[np.int32], vocab_size: int) -> NDArray[np.float64]:
    """The mean tail mass of every id [V]."""
    mass_V = np.full(vocab_size, mean[-1] / max(vocab_size - len(frequent_F), 1), np.float64)
    mass_V[frequent_F] = mean[:-1]
    return mass_V
