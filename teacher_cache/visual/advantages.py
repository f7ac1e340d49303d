"""Visual advantages: what the image is worth to each answer token, in one byte. FORMAT.md is the specification.

The advantage of a token y is log p(y | image) − log p(y | no image) under the teacher at temperature 1, in nats.

Shape suffixes: N positions, C = 256 codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.format.hidden_states import read_array, write_array

ARRAY = "visual_advantages"
CODES = 256
NOT_MEASURED = 0  # a position without a target, or of a sequence without images
_ZERO, _MOST, _PER_NAT = 128, 127, 8
_PER_CHUNK = 32768

Bytes = NDArray[np.uint8]


def encode_advantages(values_N: NDArray[np.floating]) -> Bytes:
    """Round to eighths of a nat, within ±127/8; the code of a is 128 + 8a, from 1 to 255."""
    steps_N = np.clip(np.rint(np.nan_to_num(values_N, posinf=_MOST, neginf=-_MOST) * _PER_NAT), -_MOST, _MOST)
    codes_N: Bytes = (steps_N + _ZERO).astype(np.uint8)
    return codes_N


def decode_advantages(codes_N: Bytes) -> NDArray[np.float32]:
    """The advantages in nats; NaN where none was measured."""
    values_C = ((np.arange(CODES) - _ZERO) / _PER_NAT).astype(np.float32)
    values_C[NOT_MEASURED] = np.nan
    values_N: NDArray[np.float32] = values_C[codes_N]
    return values_N


def count_codes(codes_N: Bytes) -> NDArray[np.int64]:
    """How often each code occurs, [C]."""
    return np.bincount(codes_N, minlength=CODES).astype(np.int64)


def position_weights(codes_N: Bytes, counts_C: NDArray[np.int64], strength: float) -> NDArray[np.float32]:
    """The weight of each position in a loss: (1 + β·g)/(1 + β·ḡ), with β = `strength` ≥ 0; 1 where not measured.

    g = 1 − exp(−max(a, 0)) is the share of the token's probability that the image brings, from 0 to 1, and ḡ its mean
    over all measured positions of the cache, whose codes `counts_C` counts: weights have mean 1 over these, and lie
    between 1/(1 + β) and 1 + β.
    """
    gains_C = -np.expm1(-np.maximum(np.nan_to_num(decode_advantages(np.arange(CODES, dtype=np.uint8))), 0.0))
    measured_C = counts_C * (np.arange(CODES) != NOT_MEASURED)
    mean = float((gains_C * measured_C).sum() / max(int(measured_C.sum()), 1))
    weights_C = (1 + strength * gains_C.astype(np.float64)) / (1 + strength * mean)
    weights_C[NOT_MEASURED] = 1.0
    return weights_C.astype(np.float32)[codes_N]


def write_advantages(group: zarr.Group, codes_N: Bytes) -> None:
    """Add the codes of a shard's positions to its columns."""
    write_array(group, ARRAY, codes_N, _PER_CHUNK)


class AdvantageFile:
    """The codes of one shard, opened for reading. Errors: `CacheError` naming the array."""

    def __init__(self, group: zarr.Group, positions: int, where: str) -> None:
        self._where = f"{where}/{ARRAY}"
        found: Any = group.get(ARRAY)
        if found is None or found.dtype != np.uint8 or found.shape != (positions,):
            raise CacheError(f"{self._where}: missing, or not {positions} bytes: run `cache-teacher verify`")
        self._array = found

    def read(self, start: int, stop: int) -> Bytes:
        """The codes of the positions `start` … `stop`."""
        return read_array(self._array, start, stop, self._where)
