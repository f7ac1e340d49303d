"""Checks of one shard: checksums, counts, and every number that can be checked on its own.

Shape suffixes: N positions of a block or a sequence, H their top-k ids.
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
    VISUAL_COUNTS,
    canonical,
    file_entries,
    parse_object,
)
from teacher_cache.format.quantise import log_prob_bound
from teacher_cache.format.record import Records, concatenate_records
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import HASH_BYTES, SequenceRows, edges, read_sequences
from teacher_cache.format.top_k_codes import starts
from teacher_cache.visual.advantages import ARRAY, CODES, NOT_MEASURED, count_codes

_ROUNDING = 1e-3
_REJECTION_FIELDS = {"key", "role", "reason"}


class ShardCheck:
    """A shard's folder, examined. `problems` begin with a file's name; `strays`: files not in the manifest.

    `manifest` and `rows`: None if unusable; `content`: the manifest's bytes, empty if it is missing.
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
            self.problems.append(f"{MANIFEST_NAME}: damaged (differs from cache.json)")
            return
        try:
            manifest = parse_object(self.content, MANIFEST_NAME, way_out="")
            said: dict[str, dict[str, Any]] = dict(manifest["files"])
            if canonical(manifest) != self.content or manifest["name"] != name:
                raise ValueError("not in canonical form, or of another shard")  # noqa: TRY301
        except (CacheError, KeyError, TypeError, ValueError) as error:
            self.problems.append(f"{MANIFEST_NAME}: cannot be used: {error}")
            return
        self.manifest = manifest
        self.strays = sorted(there.keys() - said.keys())
        for file in sorted(said):
            if said[file] != there.get(file):
                self.problems.append(f"{file}: {'damaged' if file in there else 'missing'}")
        if self.problems:
            return  # decoding damaged bytes would add nothing
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
            yield f"{SEQUENCES_NAME}: the positions of its sequences do not add up to those in {COLUMNS_NAME}"
            return
        counts = {"sequences": len(table), "positions": columns.positions, "heads": 0, "draws": 0}
        counts["rejected"] = rejected.count(b"\n")
        codes_C = np.zeros(CODES, np.int64)
        left = concatenate_records([], len(columns.codec.temperatures))
        row = 0
        for number in range(columns.blocks):
            (block,) = columns.records(number, number + 1)
            counts["heads"] += len(block.topk_ids_H)
            counts["draws"] += len(block.tail_ids_D)
            for name, fine in _number_checks(block, columns.codec.vocab_size):
                if not fine:
                    yield f"{COLUMNS_NAME}/{name}: holds impossible values"
            if columns.advantages is not None:
                start = number * columns.block_positions
                codes_N = columns.advantages.read(start, start + len(block))
                codes_C += count_codes(codes_N)
                if ((codes_N != NOT_MEASURED) & (block.target_ids_N == NO_TARGET)).any():
                    yield f"{COLUMNS_NAME}/{ARRAY}: holds advantages of positions without a token"
            # A block may end within a sequence, whose other positions are in the next one.
            whole = concatenate_records([left, block])
            stop = int(np.searchsorted(ends, ends[row] + len(whole), side="right")) - 1
            *parts, left = whole.split([*np.diff(ends[row : stop + 1]), int(ends[row] + len(whole) - ends[stop])])
            yield from _sequence_problems(self.rows, row, parts, columns.codec)
            row = stop
        for name, count in counts.items():
            if manifest[name] != count:
                yield f"{MANIFEST_NAME}: lists {manifest[name]} {name}, found {count}"
        if columns.advantages is not None and manifest.get(VISUAL_COUNTS) != codes_C.tolist():
            yield f"{MANIFEST_NAME}: its {VISUAL_COUNTS} are not those of {COLUMNS_NAME}/{ARRAY}"
        for line in rejected.splitlines():
            fields = json.loads(line).keys()
            if not fields >= _REJECTION_FIELDS or fields - _REJECTION_FIELDS not in (set(), {"file", "row"}):
                yield f"{REJECTED_NAME}: a row has other fields than key, role and reason, and perhaps file and row"


def _sequence_problems(rows: SequenceRows, first: int, parts: Sequence[Records], codec: Codec) -> Iterator[str]:
    """Compare the records of each sequence with its row of the table."""
    for row, part in enumerate(parts, first):
        entry = rows.sequence(row)
        ids = part.target_ids_N[part.target_ids_N != NO_TARGET].astype("<i8").tobytes()
        total = part.target_log_probs_N.sum(dtype=np.float64)
        same = hashlib.sha256(ids).digest()[:HASH_BYTES].hex() == entry.target_hash and abs(
            total - entry.sum_log_prob
        ) <= _sum_tolerance(part, codec)
        if not same:
            yield f"{SEQUENCES_NAME}: '{entry.key}' ({entry.role}) does not match its records"


def _sum_tolerance(part: Records, codec: Codec) -> float:
    """The largest difference between the sums of a sequence's log-probs after and before rounding."""
    if codec.numbers is None:
        return 1e-9 * (1 + float(np.abs(part.target_log_probs_N).sum()))
    # Twice a log-prob's own error: restoring the mass shifts all top-k log-probs by about as much.
    return 1e-3 + 2 * float(log_prob_bound(part.target_log_probs_N, codec.numbers).sum())


def _number_checks(records: Records, vocab_size: int) -> Iterator[tuple[str, bool]]:
    """Each column's name, and whether its numbers are possible; decoding already refuses ids beyond the vocabulary."""
    for name in ("target_log_probs_N", "topk_log_probs_H", "tail_log_mass_N"):
        values = getattr(records, name)
        yield name[:-2], bool((values <= _ROUNDING).all() and not np.isnan(values).any())
    yield "head_counts", bool((records.topk_counts_N >= 1).all() and (records.topk_counts_N <= vocab_size).all())
    yield "entropy", bool((records.entropy_N >= -_ROUNDING).all())
    yield "log_normalisers", bool(np.isfinite(records.log_normalisers_NS).all())
    begins_N = starts(records.topk_counts_N)
    topk_N = np.add.reduceat(np.exp(records.topk_log_probs_H, dtype=np.float64), begins_N) if len(records) else 0.0
    mass_N = topk_N + np.exp(records.tail_log_mass_N, dtype=np.float64)
    yield "head_log_probs", bool((np.abs(mass_N - 1) <= _ROUNDING).all())
