"""How a cache encodes its records: which arrays a shard has, and their types. FORMAT.md is the specification.

`precision: coarse | fine` stores numbers as small integers with known errors (`quantise.py`), `exact` as float32.
`encode.py` turns records into these columns, `decode.py` turns them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.format.quantise import COARSE, FINE, Precision

PrecisionName = Literal["coarse", "fine", "exact"]
HiddenKind = Literal["float16", "int8"]
HiddenPositions = Literal["recorded", "image"]
WithoutImage = Literal["blank", "drop"]  # how the teacher runs without what images show
CODEC_NAME = "ranked"
CODEC_VERSION = 1
_PRECISIONS: dict[str, Precision] = {"coarse": COARSE, "fine": FINE}

Block = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Column:
    """One array of a shard. `rows`: how many numbers each position has, one per row; 0: one number, without an axis of
    rows; None: a varying number per block."""

    dtype: np.dtype[Any]
    rows: int | None

    @property
    def middle(self) -> tuple[int, ...]:
        """The axes between the axis of blocks and the axis of numbers."""
        return (self.rows,) if self.rows else ()


@dataclass(frozen=True)
class Codec:
    """How a cache encodes: vocabulary size, temperatures, precision, limits of counts, forced ids, hidden states,
    visual advantages."""

    vocab_size: int
    temperatures: tuple[float, ...]
    precision: PrecisionName
    topk_limit: int
    tail_limit: int
    forced_ids: tuple[int, ...] = ()
    hidden: HiddenKind | None = None
    visual: bool = False

    def attributes(self) -> dict[str, Any]:
        """The attributes of a shard's array group, under their stored names."""
        return {
            "codec": CODEC_NAME,
            "codec_version": CODEC_VERSION,
            "vocab_size": self.vocab_size,
            "temperatures": list(self.temperatures),
            "precision": self.precision,
            "head_limit": self.topk_limit,
            "draw_limit": self.tail_limit,
            "forced_ids": list(self.forced_ids),
            "hidden": self.hidden,
            **({"visual": True} if self.visual else {}),
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], *, where: str) -> Codec:
        """Read a group's attributes back. Errors: `CacheError` for another codec, or a missing or invalid attribute."""
        found = (attributes.get("codec"), attributes.get("codec_version"))
        if found != (CODEC_NAME, CODEC_VERSION):
            raise CacheError(
                f"{where}: encoded by codec '{found[0]}' {found[1]}, not '{CODEC_NAME}' {CODEC_VERSION}: "
                "update the project or capture the cache again"
            )
        try:
            return cls(
                int(attributes["vocab_size"]),
                tuple(float(value) for value in attributes["temperatures"]),
                {"coarse": "coarse", "fine": "fine", "exact": "exact"}[attributes["precision"]],  # type: ignore[arg-type]
                int(attributes["head_limit"]),
                int(attributes["draw_limit"]),
                tuple(int(value) for value in attributes["forced_ids"]),
                {None: None, "float16": "float16", "int8": "int8"}[attributes["hidden"]],
                {False: False, True: True}[attributes.get("visual", False)],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{where}: bad attribute {error}: run `cache-teacher verify`") from error

    @property
    def numbers(self) -> Precision | None:
        """How numbers are rounded; None for `exact`."""
        return _PRECISIONS.get(self.precision)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Every array of a shard with its little-endian type."""
        columns: dict[str, tuple[str, int | None]] = {
            "head_counts": (narrowest(self.topk_limit), 0),
            "draw_counts": (narrowest(self.tail_limit), 0),
            "target_slots": (narrowest(self.topk_limit + 1), 0),
            "id_codes": ("|u1", None),
            "id_low": ("|u1", None),
            "id_high": ("<u2", None),
        }
        if self.numbers is None:
            columns |= {
                "entropy": ("<f4", 0),
                "tail_log_mass": ("<f4", 0),
                "head_log_probs": ("<f4", None),
                "outside_log_probs": ("<f4", None),
            }
            if self.temperatures:
                columns["log_normalisers"] = ("<f4", len(self.temperatures))
        else:
            columns |= {
                "entropy": ("<u2", 0),
                "tail_shares": (narrowest(self.numbers.share_levels), 1 + len(self.temperatures)),
                "head_first": ("<u2", 0),
                "head_steps": ("|u1", None),
                "head_far_steps": ("<u2", None),
                "outside_log_probs": ("<u2", None),
            }
            if self.forced_ids:
                columns["forced_log_probs"] = ("<u2", len(self.forced_ids))
        return {name: Column(np.dtype(kind), rows) for name, (kind, rows) in columns.items()}

    @cached_property
    def forced_by_id_V(self) -> NDArray[np.uint8]:
        """1 + an id's index among the forced ids; 0 for all others."""
        places_V = np.zeros(self.vocab_size, np.uint8)
        places_V[list(self.forced_ids)] = np.arange(1, len(self.forced_ids) + 1)
        return places_V


def narrowest(largest: int) -> str:
    """Name the narrowest of uint8, uint16 and uint32 that holds `largest`."""
    return "|u1" if largest < 256 else "<u2" if largest < 65536 else "<u4"
