"""What passes between a capture and vLLM's workers: an order with each request, one int32 tensor with each answer.

An answer holds seven counts (positions, temperatures, top-k entries, tail samples, hidden states, their width, and 1,
or 0 for `NOTHING`), then the columns of `Records`, whether each position was finite, and the hidden states; float32 bit
by bit.

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
NOTHING = np.zeros(_COUNTS, np.int32)  # the answer where a wanted row came out of the prefix cache


@dataclass(frozen=True)
class RecordRequest:
    """The records wanted of one sequence: rows (rising), their targets, the tail samples' seed, what a record keeps.

    `states_M` are indices into `rows_N` of the positions whose hidden state is wanted too; None for none.
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
        states = None if self.states_M is None else self.states_M.astype("<i8").tobytes()
        return {
            "rows": self.rows_N.astype("<i8").tobytes(),
            "targets": self.targets_N.astype("<i8").tobytes(),
            "key": self.key,
            "role": self.role,
            "seed": self.seed,
            "vocab_size": self.vocab_size,
            "settings": dataclasses.asdict(self.settings),
            "states": states,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> RecordRequest:
        """The order again, lists for tuples or not."""
        settings = dict(arguments["settings"])
        for name in ("temperatures", "forced_ids"):
            settings[name] = tuple(settings[name])
        states = arguments["states"]
        return cls(
            rows_N=np.frombuffer(arguments["rows"], "<i8").astype(np.int64),
            targets_N=np.frombuffer(arguments["targets"], "<i8").astype(np.int64),
            key=arguments["key"],
            role=arguments["role"],
            seed=arguments["seed"],
            vocab_size=arguments["vocab_size"],
            settings=RecordSettings(**settings),
            states_M=None if states is None else np.frombuffer(states, "<i8").astype(np.int64),
        )


@dataclass(frozen=True)
class RecordReply:
    """What came back: the records, which of the N positions had finite logits, and the hidden states if wanted."""

    records: Records
    finite_N: NDArray[np.bool_]
    states_MD: NDArray[np.float32] | None


def pack(
    records: Records, finite_N: NDArray[np.bool_], states_MD: NDArray[np.float32] | None = None
) -> NDArray[np.int32]:
    """One sequence's answer as one array of int32."""
    states = np.zeros((0, 0), np.float32) if states_MD is None else states_MD
    counts = [len(records), records.log_normalisers_NS.shape[1], len(records.topk_ids_H), len(records.tail_ids_D)]
    columns = [getattr(records, field.name) for field in dataclasses.fields(Records)]
    parts = [np.array([*counts, *states.shape, 1], np.int32), *columns, finite_N.astype(np.int32), states]
    return np.concatenate([np.ascontiguousarray(part).view(np.int32).ravel() for part in parts])


def unpack(packed: NDArray[np.int32]) -> RecordReply | None:
    """The answer in an array of int32, as views; None for `NOTHING`."""
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
