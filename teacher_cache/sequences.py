"""The table of a cache shard's sequences: one row each, an Arrow IPC file that is opened by memory map.

The sequences' positions, head entries and draws lie one after another in the order of the table, so where a sequence's
begin is the sum of the counts before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.record import Records

SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("role", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("key_hash", pa.uint64(), nullable=False),
        pa.field("target_hash", pa.binary(32), nullable=False),
        pa.field("content_hash", pa.binary(32), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("n_position", pa.int32(), nullable=False),
        pa.field("n_head", pa.int32(), nullable=False),
        pa.field("n_draw", pa.int32(), nullable=False),
        pa.field("sum_log_prob", pa.float64(), nullable=False),
        pa.field("mean_entropy", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class SequenceRecord:
    """A captured sequence: what identifies it (hashes as hex), its length in tokens, and its records."""

    key: str
    role: str
    target_hash: str
    content_hash: str
    n_tokens: int
    records: Records


def key_hash(key: str, role: str) -> int:
    """The 64-bit hash that sequences are looked up by: BLAKE2b of key, NUL, role; little-endian."""
    return int.from_bytes(hashlib.blake2b(f"{key}\0{role}".encode(), digest_size=8).digest(), "little")


def sequence_table(captured: Sequence[SequenceRecord]) -> pa.RecordBatch:
    """Make the table of sequences whose records lie one after another in the given order."""
    columns: dict[str, list[object]] = {name: [] for name in SEQUENCE_SCHEMA.names}
    for item in captured:
        records = item.records
        row = {
            "key": item.key,
            "role": item.role,
            "key_hash": key_hash(item.key, item.role),
            "target_hash": bytes.fromhex(item.target_hash),
            "content_hash": bytes.fromhex(item.content_hash),
            "n_tokens": item.n_tokens,
            "n_position": len(records),
            "n_head": len(records.head_ids_H),
            "n_draw": len(records.draw_ids_D),
            "sum_log_prob": float(records.target_log_probs_N.sum(dtype=np.float64)),
            "mean_entropy": float(records.entropy_N.mean(dtype=np.float64)) if len(records) else 0.0,
        }
        for name, value in row.items():
            columns[name].append(value)
    return pa.RecordBatch.from_pydict(columns, schema=SEQUENCE_SCHEMA)


def write_sequences(file: Path, table: pa.RecordBatch) -> None:
    """Write the table as one uncompressed Arrow IPC file with one record batch. Equal tables give equal bytes."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SEQUENCE_SCHEMA) as writer:
        writer.write_batch(table)


def edges(table: pa.RecordBatch, axis: str) -> NDArray[np.int64]:
    """Where each sequence's positions, head entries or draws begin, and where the last one's end."""
    return np.concatenate([[0], np.cumsum(table.column(f"n_{axis}").to_numpy(), dtype=np.int64)])


def read_sequences(file: Path) -> pa.RecordBatch:
    """Open the table by memory map, as one batch. Errors: `CacheError` if it cannot be read or has other columns."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (OSError, pa.ArrowException) as error:
        raise CacheError(f"{file}: cannot be read: {error}: run `cache-teacher verify`") from error
    if not reader.schema.equals(SEQUENCE_SCHEMA) or len(batches) > 1:
        raise CacheError(f"{file}: not the table of format 1: run `cache-teacher verify`")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=SEQUENCE_SCHEMA)
