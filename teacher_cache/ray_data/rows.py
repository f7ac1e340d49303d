"""Samples and captured sequences as rows of a Ray Data pipeline.

A captured sequence's row has plain columns for a user's steps (`log_probs` of the actual tokens and `entropy`, in nats,
at each recorded position), and `record`, which the cache is made from; a rejected one has its `reason` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError
from teacher_cache.engines.vllm.wire import pack, unpack
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord

Row = Mapping[str, Any]

_PLACE = [("key", pa.string()), ("shard", pa.string()), ("row", pa.int64()), ("source", pa.string())]
SAMPLE_SCHEMA = pa.schema(
    [
        *_PLACE,
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ("images", pa.list_(pa.large_binary())),
        ("image_extensions", pa.list_(pa.string())),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
)
RECORD_SCHEMA = pa.schema(
    [
        *_PLACE,
        ("role", pa.string()),
        ("shard_rows", pa.int64()),  # that the teacher gives for this shard
        ("n_tokens", pa.int64()),
        ("target_hash", pa.string()),
        ("content_hash", pa.string()),
        ("log_probs", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
        ("record", pa.large_binary()),
        ("reason", pa.string()),
    ]
)


def sample_table(samples: SampleSet, shard: str) -> pa.Table:
    """All samples of a shard."""
    rows = []
    for number in samples.rows_of(shard):
        sample = samples.read(number)
        rows.append(
            {
                "key": sample.key,
                "shard": shard,
                "row": number,
                "source": sample.source,
                "turns": [{"role": turn.role, "text": turn.text} for turn in sample.turns],
                "images": list(sample.images),
                "image_extensions": list(sample.image_extensions),
                "chosen": sample.chosen,
                "rejected": sample.rejected,
            }
        )
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def sample_of(row: Row, samples: SampleSet) -> Sample:
    """The sample of a row. Errors: `DataError` naming it if it is not the set's."""
    check_columns(row, SAMPLE_SCHEMA)
    number, key = int(row["row"]), str(row["key"])
    sample = Sample(
        key,
        tuple(Turn(turn["role"], turn["text"]) for turn in row["turns"]),
        tuple(bytes(image) for image in row["images"]),
        tuple(str(name) for name in row["image_extensions"]),
        row["chosen"] if isinstance(row["chosen"], str) else None,
        row["rejected"] if isinstance(row["rejected"], str) else None,
        str(row["source"]),
    )
    same = 0 <= number < len(samples) and samples.key_of(number) == key
    if not same or str(samples.index.column("content_hash")[number]) != sample.content_hash:
        raise DataError(
            f"sample '{key}': differs from that of set '{samples.path}': a cache holds a set as it is: filter rows "
            "before the teacher and leave the others unchanged, or pack a new set"
        )
    return samples.with_response(number, sample)


def record_table(
    captured: Iterable[SequenceRecord], rejected: Iterable[Rejection], samples: SampleSet, shard: str
) -> pa.Table:
    """What a teacher gave for samples of a shard."""
    rows: list[dict[str, Any]] = []
    for item in captured:
        records, hidden = item.records, item.hidden
        states = None if hidden is None else hidden.states_MD
        where = np.zeros(0, np.int64) if hidden is None else hidden.rows_M
        packed = pack(records, np.ones(len(records), np.bool_), states)
        rows.append(
            {
                "key": item.key,
                "role": item.role,
                "n_tokens": item.n_tokens,
                "target_hash": item.target_hash,
                "content_hash": item.content_hash,
                "log_probs": records.target_log_probs_N,
                "entropy": records.entropy_N,
                "record": np.concatenate([[hidden is not None, len(where)], where, packed]).astype("<i4").tobytes(),
            }
        )
    nothing: dict[str, Any] = {"log_probs": [], "entropy": []}
    rows += [{"key": item.key, "role": item.role, "reason": item.reason, **nothing} for item in rejected]
    sources = samples.index.column("source")
    for row in rows:
        number = samples.row_of(row["key"])
        row |= {"shard": shard, "row": number, "source": str(sources[number]), "shard_rows": len(rows)}
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def outcome_of(row: Row) -> SequenceRecord | Rejection:
    """The sequence of a row, or its rejection. Errors: `DataError` if a column is missing."""
    check_columns(row, RECORD_SCHEMA)
    key, role = str(row["key"]), str(row["role"])
    if isinstance(row["reason"], str):
        return Rejection(key, role, row["reason"])
    numbers = np.frombuffer(row["record"], "<i4").astype(np.int32)
    kept, states = bool(numbers[0]), int(numbers[1])
    reply = unpack(numbers[2 + states :])
    assert reply is not None
    hidden = None
    if kept:
        found = np.zeros((0, 0), np.float32) if reply.states_MD is None else reply.states_MD
        hidden = HiddenStates(numbers[2 : 2 + states].astype(np.int64), found)
    return SequenceRecord(
        key=key,
        role=role,
        target_hash=str(row["target_hash"]),
        content_hash=str(row["content_hash"]),
        n_tokens=int(row["n_tokens"]),
        records=reply.records,
        hidden=hidden,
    )


def by_shard(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by their shard, each shard's in the order of the set."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["shard"]), []).append(row)
    return {shard: sorted(own, key=lambda row: int(row["row"])) for shard, own in found.items()}


def check_columns(row: Row, schema: pa.Schema) -> None:
    """Refuse a row without the columns of a schema. Errors: `DataError` naming the first that is missing."""
    missing: Sequence[str] = [name for name in schema.names if name not in row]
    if missing:
        raise DataError(
            f"ray_data: the column '{missing[0]}' is missing: keep the columns of read_set and capture, and add others"
        )
