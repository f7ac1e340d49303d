"""The table of a cache shard's sequences: one row each, in a memory-mapped Arrow IPC file.

Positions, top-k ids and tail samples are stored in the order of the table, so a sequence's entries begin at the sum
of the counts before it.

Shape suffixes: Q sequences of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.record import Records

HASH_BYTES = 16  # kept of each SHA-256 (targets, content)
SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("role", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("target_hash", pa.binary(HASH_BYTES), nullable=False),
        pa.field("content_hash", pa.binary(HASH_BYTES), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("n_position", pa.int32(), nullable=False),
        pa.field("sum_log_prob", pa.float64(), nullable=False),
        pa.field("mean_entropy", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class SequenceRecord:
    """A captured sequence: what identifies it (SHA-256 as hex), its length in tokens, and its records.

    `advantages_N`: the codes of its visual advantages (see `teacher_cache/visual/advantages.py`), if they are captured.
    """

    key: str
    role: str
    target_hash: str
    content_hash: str
    n_tokens: int
    records: Records
    hidden: HiddenStates | None = None
    advantages_N: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class CachedSequence:
    """The table's row of one sequence; hashes are cut to 16 bytes, as hex; log-probs and entropy in nats."""

    key: str
    role: str
    target_hash: str
    content_hash: str
    n_tokens: int
    n_positions: int
    sum_log_prob: float
    mean_entropy: float


def short_hash(digest: str) -> str:
    """The part of a SHA-256 in hex that a cache stores: its first 16 bytes."""
    return digest[: 2 * HASH_BYTES]


def sequence_table(captured: Sequence[SequenceRecord]) -> pa.RecordBatch:
    """Make the table of sequences, in the order in which their records are stored."""
    columns: dict[str, list[object]] = {name: [] for name in SEQUENCE_SCHEMA.names}
    for item in captured:
        records = item.records
        row = {
            "key": item.key,
            "role": item.role,
            "target_hash": bytes.fromhex(short_hash(item.target_hash)),
            "content_hash": bytes.fromhex(short_hash(item.content_hash)),
            "n_tokens": item.n_tokens,
            "n_position": len(records),
            "sum_log_prob": float(records.target_log_probs_N.sum(dtype=np.float64)),
            "mean_entropy": float(records.entropy_N.mean(dtype=np.float64)) if len(records) else 0.0,
        }
        for name, value in row.items():
            columns[name].append(value)
    return pa.RecordBatch.from_pydict(columns, schema=SEQUENCE_SCHEMA)


def write_sequences(file: Path, table: pa.RecordBatch) -> None:
    """Write the table as one uncompressed Arrow IPC file with one record batch. Equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SEQUENCE_SCHEMA) as writer:
        writer.write_batch(table)
    file.write_bytes(sink.getvalue())


def edges(table: pa.RecordBatch) -> NDArray[np.int64]:
    """Where the positions of each sequence begin, and where the last ones end."""
    return np.concatenate([[0], np.cumsum(table.column("n_position").to_numpy(), dtype=np.int64)])


def read_sequences(file: Path) -> pa.RecordBatch:
    """Memory-map the table as one batch. Errors: `CacheError` if it cannot be read or has other columns."""
    return parse_sequences(map_file(file), file)


def map_file(file: Path) -> pa.Buffer:
    """The bytes of a file, mapped. Errors: `CacheError` if it cannot be read."""
    try:
        return pa.memory_map(str(file)).read_buffer()
    except (OSError, pa.ArrowException) as error:
        raise CacheError(f"{file}: cannot be read: {error}: run `cache-teacher verify`") from error


def parse_sequences(content: pa.Buffer, file: Path) -> pa.RecordBatch:
    """Parse the table as one batch of views of `content`. Errors: as `read_sequences`."""
    try:
        reader = pa.ipc.open_file(content)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (OSError, pa.ArrowException) as error:
        raise CacheError(f"{file}: cannot be read: {error}: run `cache-teacher verify`") from error
    if not reader.schema.equals(SEQUENCE_SCHEMA) or len(batches) > 1:
        raise CacheError(f"{file}: not a sequence table of format 1: run `cache-teacher verify`")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=SEQUENCE_SCHEMA)


def string_buffers(strings: pa.StringArray) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The bytes of Arrow strings, and the offsets between them; no copies."""
    offsets, text = strings.buffers()[1:]
    ends = np.frombuffer(offsets or bytes(4), np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return np.frombuffer(text or b"", np.uint8), ends


class SequenceRows:
    """The rows of one shard's table as NumPy views of the mapped file: no copies, no Python object per sequence."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self.table = table
        self.key_bytes, self.key_ends = string_buffers(table.column("key"))
        roles = table.column("role")
        self.role_names: list[str] = roles.dictionary.to_pylist()
        self.role_codes_Q: NDArray[np.int8] = roles.indices.to_numpy()
        self.n_position_Q: NDArray[np.int32] = table.column("n_position").to_numpy()

    def __len__(self) -> int:
        return len(self.role_codes_Q)

    def is_at(self, row: int, key: bytes, role: str) -> bool:
        """Whether a row has this key (in UTF-8) and role."""
        start, stop = self.key_ends[row : row + 2].tolist()
        same = self.key_bytes[start:stop].tobytes() == key
        return same and self.role_names[self.role_codes_Q[row]] == role

    def of_role(self, role: str) -> NDArray[np.bool_]:
        """Which rows have a role."""
        code = self.role_names.index(role) if role in self.role_names else -1
        of_role_Q: NDArray[np.bool_] = self.role_codes_Q == code
        return of_role_Q

    def rows_in_order(self, text: NDArray[np.uint8], ends: NDArray[np.integer], role: str) -> NDArray[np.int64] | None:
        """The rows of a role, if their keys, in order, are exactly those in `text` between `ends`."""
        of_role = self.of_role(role)
        rows = np.flatnonzero(of_role)
        if len(rows) != len(ends) - 1:
            return None
        if not len(rows):
            return rows
        mine, my_ends = self.key_bytes, self.key_ends
        if len(rows) < len(of_role):
            mine, my_ends = string_buffers(self.table.column("key").filter(pa.array(of_role)))
        same = np.array_equal(my_ends - my_ends[0], ends - ends[0])
        same = same and np.array_equal(mine[my_ends[0] : my_ends[-1]], text[ends[0] : ends[-1]])
        return rows if same else None

    def item(self, row: int) -> tuple[str, str]:
        """The key and the role of one row."""
        start, stop = self.key_ends[row : row + 2].tolist()
        return self.key_bytes[start:stop].tobytes().decode(), self.role_names[self.role_codes_Q[row]]

    def sequence(self, row: int) -> CachedSequence:
        """One row as an object."""
        tokens, sums, entropies = self._numbers
        targets, contents = self._hashes
        return CachedSequence(
            *self.item(row),
            targets[row].tobytes().hex(),
            contents[row].tobytes().hex(),
            int(tokens[row]),
            int(self.n_position_Q[row]),
            float(sums[row]),
            float(entropies[row]),
        )

    @cached_property
    def starts_Q(self) -> NDArray[np.int64]:
        """Where the positions of each sequence begin, and where the last ones end."""
        return edges(self.table)

    @cached_property
    def _numbers(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        names = ("n_tokens", "sum_log_prob", "mean_entropy")
        tokens, sums, entropies = (self.table.column(name).to_numpy() for name in names)
        return tokens, sums, entropies

    @cached_property
    def _hashes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        buffers = [self.table.column(name).buffers()[1] for name in ("target_hash", "content_hash")]
        targets, contents = (np.frombuffer(buffer or b"", np.uint8).reshape(-1, HASH_BYTES) for buffer in buffers)
        return targets, contents
