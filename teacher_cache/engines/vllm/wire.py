"""What passes between a capture and vLLM's workers: a `RecordRequest` on the way out, one int32 tensor on the way back.

A reply holds seven counts (positions, temperatures, top-k entries, tail samples, hidden states, their width, and 1, or
0 for `NOTHING`), then the columns of `Records`, whether each position was finite, and the hidden states; float32 values
are reinterpreted, not converted.

Shape suffixes: N recorded positions, S temperatures, H top-k entries, D tail samples, M hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.record import Records, RecordSettings

_COUNTS = 7
_ARRAYS = ("rows_N", "targets_N", "states_M")
NOTHING = np.zeros(_COUNTS, np.int32)  # the reply if a wanted row came from the prefix cache


@dataclass(frozen=True)
class RecordRequest:
    """The records wanted of one sequence: rows (rising), their targets, the tail samples' seed, what a record keeps.

    `states_M`: indices into `rows_N` of the positions whose hidden state is also wanted; None for none.
    """

    rows_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    key: str
    role: str
    seed: int
    vocab_size: int
    settings: RecordSettings
    states_M: NDArray[np.int64] | None = None

    def to_arguments(self) -> dict[str, Any]:
        """As values that msgpack can carry."""
        given = {name: getattr(self, name) for name in _ARRAYS}
        arrays = {name: None if array is None else array.astype("<i8").tobytes() for name, array in given.items()}
        return {**vars(self), **arrays, "settings": dataclasses.asdict(self.settings)}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> RecordRequest:
        """The inverse of `to_arguments`; msgpack may have turned tuples into lists."""
        packed = {name: arguments[name] for name in _ARRAYS}
        arrays = {
            name: None if data is None else np.frombuffer(data, "<i8").astype(np.int64) for name, data in packed.items()
        }
        settings = arguments["settings"]
        tuples = {name: tuple(settings[name]) for name in ("temperatures", "forced_ids")}
        return cls(**{**arguments, **arrays, "settings": RecordSettings(**{**settings, **tuples})})


@dataclass(frozen=True)
class RecordReply:
    """The records, which of the N positions had finite logits, and the hidden states if wanted."""

    records: Records
    finite_N: NDArray[np.bool_]
    states_MD: NDArray[np.float32] | None


def pack(
    records: Records, finite_N: NDArray[np.bool_], states_MD: NDArray[np.float32] | None = None
) -> NDArray[np.int32]:
    """One sequence's reply as one array of int32."""
    states = np.zeros((0, 0), np.float32) if states_MD is None else states_MD
    counts = [len(records), records.log_normalisers_NS.shape[1], len(records.topk_ids_H), len(records.tail_ids_D)]
    columns = [getattr(records, field.name) for field in dataclasses.fields(Records)]
    parts = [np.array([*counts, *states.shape, 1], np.int32), *columns, finite_N.astype(np.int32), states]
    return np.concatenate([np.ascontiguousarray(part).view(np.int32).ravel() for part in parts])


def unpack(packed: NDArray[np.int32]) -> RecordReply | None:
    """The reply in an array of int32, as views; None for `NOTHING`."""
    positions, temperatures, topk, samples, states, width, computed = packed[:_COUNTS].tolist()
    if not computed:
        return None
    lengths = {"H": topk, "D": samples}
    at = _COUNTS
    columns: dict[str, NDArray[Any]] = {}
    for field in dataclasses.fields(Records):
        size = positions * temperatures if field.name.endswith("_NS") else lengths.get(field.name[-1], positions)
        columns[field.name] = packed[at : at + size].view(np.int32 if field.type == "Ints" else np.float32)
        at += size
    columns["log_normalisers_NS"] = columns["log_normalisers_NS"].reshape(positions, temperatures)
    finite_N = packed[at : at + positions].astype(np.bool_)
    states_MD = packed[at + positions :].view(np.float32).reshape(states, width) if width else None
    return RecordReply(Records(**columns), finite_N, states_MD)
