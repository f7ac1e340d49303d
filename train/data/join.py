"""Join a set and a cache once at the start, to decide which samples are trained on.

Compares keys in Arrow and NumPy columns, without decoding samples or making Python objects for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llavamod_offline.data.sample import ROLES_OF_KIND
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError

if TYPE_CHECKING:
    from teacher_cache.read.reader import TeacherCache
    from teacher_cache.read.several import Teachers

MISMATCHED = "mismatched"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Join:
    """The rows of a set that a run uses, in set order: those trained on and those held out.

    `records`: for each role, the cache's row for each row of the set, −1 if it has none; empty without a cache.
    `kept_hash`: SHA-256 (hex) over the keys of `rows`, joined by newlines.
    """

    rows: NDArray[np.int64]
    holdout: NDArray[np.int64]
    missing: int
    too_long: tuple[tuple[str, str], ...]
    kept_hash: str
    records: Mapping[str, NDArray[np.int64]]


def join(
    samples: SampleSet,
    roles: Sequence[str],
    cache: Teachers | None,
    *,
    missing: str,
    holdout: int,
    seed: int,
    lengths: Callable[[NDArray[np.bool_]], NDArray[np.int64]] | None = None,
    max_length: int = 0,
    context: int = sys.maxsize,
    too_long: str = "error",
) -> Join:
    """Choose the rows of a set to use: with a cache, those that have a record for every role.

    `missing`, `too_long` (samples of more tokens than `max_length`, or than `context`, the most that the student
    takes): `error` or `drop`. `lengths` measures the rows
    that are kept so far (None: no sample is too long). `holdout` rows are chosen by a hash of (seed, key).
    Errors: `DataError` if samples are of the wrong kind, lack a record or are too long (`error`), or nothing is left to
    train on.
    """
    _check_kind(samples, roles)
    keys = samples.index.column("key")
    kept = np.ones(len(samples), np.bool_)
    records = {} if cache is None else {role: cache.rows(keys, role, samples.shard_rows) for role in roles}
    for role, records_N in records.items():
        kept &= (records_N >= 0) | ~_has_role(samples, role)
    if cache is not None and not kept.all():
        for part, without in cache.assigned(np.flatnonzero(~kept)):
            _report_missing(samples, _lacking(samples, part, roles, without), part.path, missing)
    absent = len(samples) - int(kept.sum())
    long = {} if lengths is None else _too_long(samples, lengths(kept), int(kept.sum()), max_length, context, too_long)
    kept[list(long)] = False
    rows = np.flatnonzero(kept)
    if len(rows) <= holdout:
        ways = {"raise max_length": long, "capture those that cache.path lacks": absent, "lower data.holdout": holdout}
        raise DataError(
            f"set '{samples.path}': {len(rows)} of {len(samples)} samples can be used and {holdout} are held out: "
            f"nothing is left: {', '.join(way for way, cause in ways.items() if cause) or 'use more data'}"
        )
    held = rows[_lowest(_seeded_hashes(keys.take(rows), seed), holdout)] if holdout else rows[:0]
    kept[held] = False
    return Join(
        rows=np.flatnonzero(kept) if holdout else rows,
        holdout=held,
        missing=absent,
        too_long=tuple((samples.key_of(row), reason) for row, reason in long.items()),
        kept_hash=_hash_of_keys(keys, kept),
        records=records,
    )


def rejection_lines(samples: SampleSet, too_long: Sequence[tuple[str, str]]) -> str:
    """Format the lines of `rejected.jsonl`, with the file and row of each sample if the set knows them."""
    lines = []
    for key, reason in too_long:
        origin = zip(("file", "row"), samples.origin(key) or (), strict=False)
        lines.append(json.dumps({"key": key, "reason": reason, **dict(origin)}) + "\n")
    return "".join(lines)


def _check_kind(samples: SampleSet, roles: Sequence[str]) -> None:
    kinds = samples.index.column("kind")
    right = {kind for kind, own in ROLES_OF_KIND.items() if set(roles) - {MISMATCHED} == set(own)}
    if MISMATCHED in roles:
        right = set(ROLES_OF_KIND) - {"conversation"}
    wrong = pc.index(pc.is_in(kinds, pa.array(sorted(right))), False).as_py()
    if wrong < 0:
        return
    kind, where = kinds[wrong].as_py(), f"set '{samples.path}': sample '{samples.key_of(wrong)}'"
    if kind in ("desirable", "undesirable") and "chosen" in roles:
        raise DataError(f"{where} is an unpaired answer, from which only kto learns: set loss.kind to kto")
    given, needed = ("conversation", "preference") if "chosen" in roles else ("preference", "conversation")
    raise DataError(f"{where} is a {given}, but the stage needs {needed}s: set data.set to one of those")


def _has_role(samples: SampleSet, role: str) -> NDArray[np.bool_]:
    """Return which samples of a set have a role; their kinds must be right."""
    kinds = [kind for kind, roles in ROLES_OF_KIND.items() if role in roles or role == MISMATCHED]
    found: NDArray[np.bool_] = pc.is_in(samples.index.column("kind"), pa.array(kinds)).to_numpy()
    return found


def _lacking(
    samples: SampleSet, cache: TeacherCache, roles: Sequence[str], rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return which of the samples in `rows` lack a record in the cache for one of their roles."""
    keys, lacks = samples.index.column("key").take(rows), np.zeros(len(rows), np.bool_)
    for role in roles:
        lacks |= (cache.rows(keys, role) < 0) & _has_role(samples, role)[rows]
    return rows[lacks]


def _report_missing(samples: SampleSet, absent: NDArray[np.int64], cache: str, policy: str) -> None:
    if not len(absent):
        return
    first = ", ".join(samples.key_of(row) for row in absent[:3].tolist()) + (", …" if len(absent) > 3 else "")
    said = f"{len(absent)} of {len(samples)} samples have no record in cache '{cache}' ({first})"
    if policy == "error":
        raise DataError(f"{said}: capture them, or set cache.missing=drop to train without them")
    logger.warning("%s: dropped", said)


def _too_long(
    samples: SampleSet, lengths_N: NDArray[np.int64], used: int, max_length: int, context: int, policy: str
) -> dict[int, str]:
    """Find samples that are too long, by row, with the reason. Errors: `DataError` (`error`)."""
    limit, other = f"max_length {max_length}", "raise max_length"
    if context < max_length:
        limit, other = f"the {context} that the student takes", "choose another student"
    rows = np.flatnonzero(lengths_N > min(max_length, context)).tolist()
    found = {row: f"sample '{samples.key_of(row)}': {lengths_N[row]} tokens, more than {limit}" for row in rows}
    if not found:
        return found
    longest = f"the longest has {lengths_N.max()}"
    if policy == "error":
        more = f"; {len(found)} of {used} samples are longer, {longest}" if len(found) > 1 else ""
        raise DataError(
            f"{found[rows[0]]}{more}: set data.too_long=drop to train without {'them' if more else 'it'}, or {other}"
        )
    logger.warning("%d of %d samples have more tokens than %s (%s): dropped", len(found), used, limit, longest)
    return found


def _seeded_hashes(keys: pa.ChunkedArray, seed: int) -> NDArray[np.uint64]:
    from teacher_cache.read.key_index import column_texts, key_hashes, role_salt

    return key_hashes(*column_texts(keys), np.full(len(keys), role_salt(f"holdout:{seed}"), np.uint64))


def _lowest(hashes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Return the indices of the lowest hashes, ascending; of equal hashes, the first win."""
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def _hash_of_keys(keys: pa.ChunkedArray, kept: NDArray[np.bool_]) -> str:
    digest, start, separator = hashlib.sha256(), 0, b""
    for chunk in keys.chunks:
        stop = start + len(chunk)
        mine = chunk if kept[start:stop].all() else chunk.filter(pa.array(kept[start:stop]))
        if len(mine):
            texts = pa.ListArray.from_arrays(pa.array([0, len(mine)], pa.int32()), mine)
            digest.update(separator)
            digest.update(pc.binary_join(texts, "\n")[0].as_buffer())
            separator = b"\n"
        start = stop
    return digest.hexdigest()
