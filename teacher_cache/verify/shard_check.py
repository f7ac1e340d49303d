"""What can be wrong with one shard: checksums, counts, and every number that can be checked by itself.

Shape suffixes: N positions of a block or a sequence, H entries of their heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import CacheError
from teacher_cache.format.columns import ColumnFile
from teacher_cache.format.manifest import (
    COLUMNS_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    canonical,
    file_entries,
    parse_object,
)
from teacher_cache.format.quantise import log_prob_bound
from teacher_cache.format.record import Records, concatenate_records
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import HASH_BYTES, SequenceRows, edges, read_sequences
from teacher_cache.format.top_k_codes import starts

_ROUNDING = 1e-3


class ShardCheck:
    """A shard's folder, examined. `problems` begin with a file's name; `strays` are files that no manifest names.

    `manifest` and `rows` are there if they can be used; `content` is the manifest's, empty if there is none.
    """

    def __init__(self, folder: Path, name: str, manifest_sha256: str | None) -> None:
        self.problems: list[str] = []
        self.strays: list[str] = []
        self.manifest: dict[str, Any] | None = None
        self.rows: SequenceRows | None = None
        self.content = b""
        there = file_entries(folder)
        found = there.pop(MANIFEST_NAME, None)
        if found is None:
            self.problems.append(f"{MANIFEST_NAME}: missing")
            return
        self.content = (folder / MANIFEST_NAME).read_bytes()
        if manifest_sha256 not in (None, found["sha256"]):
            self.problems.append(f"{MANIFEST_NAME}: damaged (not what cache.json says)")
            return
        try:
            manifest = parse_object(self.content, MANIFEST_NAME, way_out="")
            said: dict[str, dict[str, Any]] = dict(manifest["files"])
            if canonical(manifest) != self.content or manifest["name"] != name:
                raise ValueError("not as it was written")  # noqa: TRY301
        except (CacheError, KeyError, TypeError, ValueError) as error:
            self.problems.append(f"{MANIFEST_NAME}: cannot be used: {error}")
            return
        self.manifest = manifest
        self.strays = sorted(there.keys() - said.keys())
        for file in sorted(said):
            if said[file] != there.get(file):
                self.problems.append(f"{file}: {'damaged' if file in there else 'missing'}")
        if self.problems:
            return  # decoding damaged bytes says nothing new
        try:
            self.problems += self._content_problems(folder, manifest)
        except (CacheError, KeyError, TypeError, ValueError, IndexError) as error:
            self.problems.append(f"{COLUMNS_NAME}: cannot be decoded: {error}")

    def _content_problems(self, folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
        table = read_sequences(folder / SEQUENCES_NAME)
        try:
            table.validate(full=True)
        except pa.ArrowInvalid as error:
            yield f"{SEQUENCES_NAME}: cannot be used: {error}"
            return
        self.rows = SequenceRows(table)
        columns = ColumnFile(folder / COLUMNS_NAME)
        rejected = (folder / REJECTED_NAME).read_bytes()
        ends = edges(table)
        if ends[-1] != columns.positions:
            yield f"{SEQUENCES_NAME}: the sequences' positions do not add up to those that are there"
            return
        counts = {"sequences": len(table), "positions": columns.positions, "heads": 0, "draws": 0}
        counts["rejected"] = rejected.count(b"\n")
        left = concatenate_records([], len(columns.codec.temperatures))
        row = 0
        for number in range(columns.blocks):
            (block,) = columns.records(number, number + 1)
            counts["heads"] += len(block.topk_ids_H)
            counts["draws"] += len(block.tail_ids_D)
            for name, fine in _number_checks(block, columns.codec.vocab_size):
                if not fine:
                    yield f"{COLUMNS_NAME}/{name}: holds impossible values"
            # A block may end within a sequence, which then waits for its other positions.
            whole = concatenate_records([left, block])
            stop = int(np.searchsorted(ends, ends[row] + len(whole), side="right")) - 1
            *parts, left = whole.split([*np.diff(ends[row : stop + 1]), int(ends[row] + len(whole) - ends[stop])])
            yield from _sequence_problems(self.rows, row, parts, columns.codec)
            row = stop
        for name, count in counts.items():
            if manifest[name] != count:
                yield f"{MANIFEST_NAME}: says {manifest[name]} {name}, there are {count}"
        for line in rejected.splitlines():
            if json.loads(line).keys() != {"key", "role", "reason"}:
                yield f"{REJECTED_NAME}: a row has other fields than key, role and reason"


def _sequence_problems(rows: SequenceRows, first: int, parts: Sequence[Records], codec: Codec) -> Iterator[str]:
    """Compare records, sequence by sequence, with what the table says of them."""
    for row, part in enumerate(parts, first):
        entry = rows.sequence(row)
        ids = part.target_ids_N[part.target_ids_N != NO_TARGET].astype("<i8").tobytes()
        total = part.target_log_probs_N.sum(dtype=np.float64)
        same = hashlib.sha256(ids).digest()[:HASH_BYTES].hex() == entry.target_hash and abs(
            total - entry.sum_log_prob
        ) <= _sum_tolerance(part, codec)
        if not same:
            yield f"{SEQUENCES_NAME}: '{entry.key}' ({entry.role}) does not fit its records"


def _sum_tolerance(part: Records, codec: Codec) -> float:
    """How far the sum of a sequence's decoded log-probs may lie from the one that was taken before rounding."""
    if codec.numbers is None:
        return 1e-9 * (1 + float(np.abs(part.target_log_probs_N).sum()))
    # Twice a log-prob's own error: a head is also shifted as a whole, by about as much, for its mass to be right.
    return 1e-3 + 2 * float(log_prob_bound(part.target_log_probs_N, codec.numbers).sum())


def _number_checks(records: Records, vocab_size: int) -> Iterator[tuple[str, bool]]:
    """Each column's name, and whether its numbers can be; ids beyond the vocabulary are refused while decoding."""
    for name in ("target_log_probs_N", "topk_log_probs_H", "tail_log_mass_N"):
        values = getattr(records, name)
        yield name[:-2], bool((values <= _ROUNDING).all() and not np.isnan(values).any())
    yield "head_counts", bool((records.topk_counts_N >= 1).all() and (records.topk_counts_N <= vocab_size).all())
    yield "entropy", bool((records.entropy_N >= -_ROUNDING).all())
    yield "log_normalisers", bool(np.isfinite(records.log_normalisers_NS).all())
    begins_N = starts(records.topk_counts_N)
    head_N = np.add.reduceat(np.exp(records.topk_log_probs_H, dtype=np.float64), begins_N) if len(records) else 0.0
    mass_N = head_N + np.exp(records.tail_log_mass_N, dtype=np.float64)
    yield "head_log_probs", bool((np.abs(mass_N - 1) <= _ROUNDING).all())
