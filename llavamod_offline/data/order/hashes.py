"""Hashes of numbers: the randomness of the training order, independent of any library's generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHARDS, COPIES, BATCHES = 1, 2, 3  # what may be numbered besides samples

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def hashes(numbers: NDArray[np.integer], seed: int, epoch: int, kind: int = 0) -> NDArray[np.uint64]:
    """64-bit SplitMix64 hashes (Steele, Lea and Flood, OOPSLA 2014), injective; `kind`: what is numbered."""
    start = _mix(np.array([(seed + _GAMMA) & _MASK], dtype=np.uint64)) ^ np.uint64(epoch)
    for _ in range(kind):
        start = _mix(start)
    with np.errstate(over="ignore"):
        return _mix(_mix(start) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, element by element."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
