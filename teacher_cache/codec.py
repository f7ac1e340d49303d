"""Codec 1 (`plain`): records ↔ the columns that the arrays of a cache shard hold. FORMAT.md is its specification.

Ids take the narrowest of 1, 2 and 4 bytes that the vocabulary needs. Head log-probs are float32, or float16 with an
error of at most 2⁻¹¹ of their own magnitude (2⁻²⁵ absolute near 0); from float16 the decoder shifts each head so that
head and tail together have mass 1, by no more than 2⁻¹¹ of the head's mean |log p|. Everything else is exact.

Letters: N positions, H entries of all heads, D distinct draws of all tails, S temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.record import Records

Axis = Literal["position", "head", "draw"]
LogProbs = Literal["float16", "float32"]
CODEC_NAME = "plain"
CODEC_VERSION = 1
_LOWEST_HALF = float(np.finfo(np.float16).min)

COLUMN_AXES: dict[str, Axis] = {
    "target_ids": "position",
    "target_log_probs": "position",
    "entropy": "position",
    "tail_log_mass": "position",
    "log_normalisers": "position",
    "head_counts": "position",
    "draw_counts": "position",
    "head_ids": "head",
    "head_log_probs": "head",
    "draw_ids": "draw",
    "draw_repeats": "draw",
}


@dataclass(frozen=True)
class Codec:
    """How one cache encodes: vocabulary size, stored temperatures, type of the head's log-probs, caps of counts."""

    vocab_size: int
    temperatures: tuple[float, ...]
    log_probs: LogProbs
    head_limit: int
    draw_limit: int

    def attributes(self) -> dict[str, Any]:
        """What a shard's array group says about its encoding."""
        return {
            "codec": CODEC_NAME,
            "codec_version": CODEC_VERSION,
            "vocab_size": self.vocab_size,
            "temperatures": list(self.temperatures),
            "log_probs": self.log_probs,
            "head_limit": self.head_limit,
            "draw_limit": self.draw_limit,
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], *, where: str) -> Codec:
        """Read a group's attributes back. Errors: `CacheError` for another codec, or a missing or odd attribute."""
        found = (attributes.get("codec"), attributes.get("codec_version"))
        if found != (CODEC_NAME, CODEC_VERSION):
            raise CacheError(
                f"{where}: encoded by codec '{found[0]}' {found[1]}, this reads '{CODEC_NAME}' {CODEC_VERSION}: "
                "update the project or capture the cache again"
            )
        try:
            return cls(
                int(attributes["vocab_size"]),
                tuple(float(value) for value in attributes["temperatures"]),
                {"float16": "float16", "float32": "float32"}[attributes["log_probs"]],  # type: ignore[arg-type]
                int(attributes["head_limit"]),
                int(attributes["draw_limit"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{where}: bad attribute {error}: see `cache-teacher verify`") from error

    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The type of every column, little-endian."""
        ids = narrowest(self.vocab_size - 1)
        types: dict[str, DTypeLike] = {
            "target_ids": ids,
            "target_log_probs": "<f4",
            "entropy": "<f4",
            "tail_log_mass": "<f4",
            "log_normalisers": "<f4",
            "head_counts": narrowest(self.head_limit),
            "draw_counts": narrowest(self.draw_limit),
            "head_ids": ids,
            "head_log_probs": "<f2" if self.log_probs == "float16" else "<f4",
            "draw_ids": ids,
            "draw_repeats": narrowest(self.draw_limit),
        }
        return {name: np.dtype(kind) for name, kind in types.items()}

    def encode(self, records: Records) -> dict[str, NDArray[Any]]:
        """Turn records into columns. Errors: `CacheError` if an id or a count does not fit its column."""
        columns = {}
        for name, dtype in self.dtypes().items():
            values = getattr(records, _field(name))
            if dtype.kind == "u" and len(values):
                limit = self.vocab_size - 1 if name.endswith("ids") else int(np.iinfo(dtype).max)
                if values.min() < 0 or values.max() > limit:
                    raise CacheError(f"column '{name}' holds {values.min()} … {values.max()}, beyond 0 … {limit}")
            if dtype == np.float16:
                values = np.maximum(values, _LOWEST_HALF)
            columns[name] = np.ascontiguousarray(values, dtype=dtype)
        return columns

    def decode(self, columns: Mapping[str, NDArray[Any]]) -> Records:
        """Turn columns, whole or consistent slices of them, back into records."""
        wide: dict[str, Any] = {
            name: values.astype(np.int32 if values.dtype.kind == "u" else np.float32, copy=False)
            for name, values in columns.items()
        }
        if self.log_probs == "float16" and len(wide["head_counts"]):
            wide["head_log_probs"] = _with_full_mass(wide["head_log_probs"], wide["head_counts"], wide["tail_log_mass"])
        return Records(**{_field(name): wide[name] for name in COLUMN_AXES})


def narrowest(largest: int) -> str:
    """The narrowest unsigned little-endian type that holds 0 … `largest`."""
    return "|u1" if largest < 2**8 else "<u2" if largest < 2**16 else "<u4"


def _field(column: str) -> str:
    """The field of `Records` that a column holds: its name with the shape's letters."""
    if column == "log_normalisers":
        return "log_normalisers_NS"
    return f"{column}_{ {'position': 'N', 'head': 'H', 'draw': 'D'}[COLUMN_AXES[column]] }"


def _with_full_mass(
    log_probs_H: NDArray[np.float32], counts_N: NDArray[np.int32], tail_log_mass_N: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Shift every head by one number so that its mass is 1 − tail mass."""
    starts_N = np.cumsum(counts_N, dtype=np.int64) - counts_N
    mass_N = np.add.reduceat(np.exp(log_probs_H, dtype=np.float64), starts_N)
    shift_N = np.log(-np.expm1(tail_log_mass_N.astype(np.float64))) - np.log(mass_N)
    return log_probs_H + np.repeat(shift_N, counts_N).astype(np.float32)
