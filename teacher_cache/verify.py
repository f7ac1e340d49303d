"""`cache-teacher verify`: recompute every checksum, decode everything, and name whatever is wrong."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from llavamod_offline.errors import CacheError
from teacher_cache.codec import COLUMN_AXES
from teacher_cache.columns import ColumnFile
from teacher_cache.manifest import (
    CACHE_NAME,
    COLUMNS_NAME,
    COUNTS,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    cache_digest,
    canonical,
    file_entries,
    file_entry,
    read_object,
    sha256_file,
)
from teacher_cache.record import Records
from teacher_cache.sequences import edges, key_hash, read_sequences

_BATCH_POSITIONS = 65536
_MASS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What `verify` found. `digest` is recomputed from the bytes on disk; `damage` names each thing that is wrong."""

    ok: bool
    shards: int
    sequences: int
    positions: int
    digest: str
    damage: list[str]


def verify_cache(path: Path) -> Verdict:
    """Check a finished cache byte by byte and number by number.

    Errors: `CacheError` if there is no cache, or it is unfinished; damage is not raised but reported.
    """
    if not (path / CACHE_NAME).is_file():
        way_out = "run `cache-teacher run` again to finish it" if (path / JOB_NAME).is_file() else "it is no cache"
        raise CacheError(f"cache '{path}': {CACHE_NAME} is missing: {way_out}")
    try:
        cache = read_object(path / CACHE_NAME, way_out="")
        found = _rebuilt(path, cache)
    except (CacheError, KeyError, TypeError, AttributeError) as error:
        return Verdict(False, 0, 0, 0, "", [f"{CACHE_NAME}: cannot be used: {error}"])
    damage = []
    if (path / CACHE_NAME).read_bytes() != canonical(cache):
        damage.append(f"{CACHE_NAME}: not in canonical form")
    digest = cache_digest(found)
    if digest != cache.get("digest") or found != {name: cache[name] for name in cache if name != "digest"}:
        damage += list(_changed(cache, found)) or [f"{CACHE_NAME}: its digest is not that of the files"]
    names = [str(shard["name"]) for shard in cache["shards"]]
    folders = (path / SHARDS_NAME).iterdir() if (path / SHARDS_NAME).is_dir() else ()
    for extra in sorted({folder.name for folder in folders if folder.name[0] != "."} - set(names)):
        damage.append(f"{SHARDS_NAME}/{extra}: not a shard of this cache")
    seen: set[tuple[str, str]] = set()
    for name in tqdm(names, desc="verify", unit="shard", disable=not sys.stderr.isatty()):
        folder = path / SHARDS_NAME / name
        damage += [f"{SHARDS_NAME}/{name}/{problem}" for problem in _shard_problems(folder, seen)]
    totals = found["totals"]
    return Verdict(not damage, len(names), totals["sequences"], totals["positions"], digest, damage)


def _rebuilt(path: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """What cache.json would have to say of the files that are there."""
    shards = []
    for shard in cache["shards"]:
        folder = path / SHARDS_NAME / str(shard["name"])
        entry = dict.fromkeys(("bytes", "manifest_sha256", *COUNTS), 0) | {"name": shard["name"]}
        try:
            manifest = read_object(folder / MANIFEST_NAME, way_out="")
            entry |= {count: manifest[count] for count in COUNTS}
            entry["manifest_sha256"] = sha256_file(folder / MANIFEST_NAME)
            entry["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        except (CacheError, KeyError):
            pass  # named below, as damage of this shard
        shards.append(entry)
    return {
        "format_version": cache["format_version"],
        "fingerprint": cache["fingerprint"],
        "shards": shards,
        "totals": {count: sum(shard[count] for shard in shards) for count in ("bytes", *COUNTS)},
        "files": {n: file_entry(path / n) for n in (JOB_NAME, REJECTED_NAME) if (path / n).is_file()},
    }


def _changed(cache: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for name in (JOB_NAME, REJECTED_NAME):
        if cache["files"].get(name) != found["files"].get(name):
            yield f"{name}: missing, or not what {CACHE_NAME} says"
    for said, is_there in zip(cache["shards"], found["shards"], strict=True):
        if said != is_there:
            yield f"{SHARDS_NAME}/{said['name']}/{MANIFEST_NAME}: missing, or not what {CACHE_NAME} says"
    rest = ("format_version", "fingerprint", "totals", "digest")
    if cache_digest(cache) != cache.get("digest") or cache.keys() - {*rest, "files", "shards"}:
        yield f"{CACHE_NAME}: its digest is not that of its content"


def _shard_problems(folder: Path, seen: set[tuple[str, str]]) -> Iterator[str]:
    try:
        manifest = read_object(folder / MANIFEST_NAME, way_out="")
        said: dict[str, dict[str, Any]] = manifest["files"]
        there = file_entries(folder)
    except (CacheError, KeyError, OSError) as error:
        yield f"{MANIFEST_NAME}: cannot be used: {error}"
        return
    del there[MANIFEST_NAME]
    broken = False
    for name in sorted(said.keys() | there.keys()):
        if said.get(name) != there.get(name):
            broken = True
            state = "missing" if name not in there else "not part of the cache" if name not in said else "damaged"
            yield f"{name}: {state}"
    if broken:
        return  # decoding damaged bytes says nothing new
    try:
        yield from _content_problems(folder, manifest, seen)
    except (CacheError, KeyError, ValueError, IndexError) as error:
        yield f"{COLUMNS_NAME}: cannot be decoded: {error}"


def _content_problems(folder: Path, manifest: dict[str, Any], seen: set[tuple[str, str]]) -> Iterator[str]:
    table = read_sequences(folder / SEQUENCES_NAME)
    columns = ColumnFile(folder / COLUMNS_NAME)
    counts = {
        "sequences": len(table),
        "positions": columns.length("position"),
        "heads": columns.length("head"),
        "draws": columns.length("draw"),
        "rejected": (folder / REJECTED_NAME).read_bytes().count(b"\n"),
    }
    for name, count in counts.items():
        if manifest[name] != count:
            yield f"{MANIFEST_NAME}: says {manifest[name]} {name}, there are {count}"
    for line in (folder / REJECTED_NAME).read_text().splitlines():
        if json.loads(line).keys() != {"key", "role", "reason"}:
            yield f"{REJECTED_NAME}: a row has other fields than key, role and reason"
    yield from _table_problems(table, counts, seen)
    start = 0
    ends = edges(table, "position")
    while start < len(table):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + _BATCH_POSITIONS, side="right")) - 1)
        yield from _record_problems(table, slice(start, stop), columns)
        start = stop


def _table_problems(table: pa.RecordBatch, counts: dict[str, int], seen: set[tuple[str, str]]) -> Iterator[str]:
    for axis, total in (("position", "positions"), ("head", "heads"), ("draw", "draws")):
        if edges(table, axis)[-1] != counts[total]:
            yield f"{SEQUENCES_NAME}: the sequences' {total} do not add up to those that are there"
    for key, role, number in zip(*(table[c].to_pylist() for c in ("key", "role", "key_hash")), strict=True):
        if number != key_hash(key, role):
            yield f"{SEQUENCES_NAME}: key hash of '{key}' ({role}) is wrong"
        if (key, role) in seen:
            yield f"{SEQUENCES_NAME}: '{key}' ({role}) is in the cache twice"
        seen.add((key, role))


def _record_problems(table: pa.RecordBatch, rows: slice, columns: ColumnFile) -> Iterator[str]:
    """Decode the sequences of some rows and check every number that can be checked."""
    spans = {axis: edges(table, axis)[[rows.start, rows.stop]].tolist() for axis in ("position", "head", "draw")}
    encoded = {name: columns.read(name, *spans[axis]) for name, axis in COLUMN_AXES.items()}
    table = table.slice(rows.start, rows.stop - rows.start)
    if not _mass_fits(encoded):
        yield f"{COLUMNS_NAME}/head_log_probs: head and tail do not have mass 1"
        return
    records = columns.codec.decode(encoded)
    for name, fine in _number_checks(records, columns.codec.vocab_size):
        if not fine:
            yield f"{COLUMNS_NAME}/{name}: holds impossible values"
    sizes = [table[f"n_{axis}"].to_numpy() for axis in ("position", "head", "draw")]
    for row, piece in enumerate(records.split(sizes[0].tolist())):
        entry = table.slice(row, 1).to_pylist()[0]
        ids = piece.target_ids_N.astype("<i8").tobytes()
        total = piece.target_log_probs_N.sum(dtype=np.float64)
        same = (
            len(piece.head_ids_H) == sizes[1][row]
            and len(piece.draw_ids_D) == sizes[2][row]
            and hashlib.sha256(ids).digest() == entry["target_hash"]
            and np.isclose(total, entry["sum_log_prob"], rtol=1e-9, atol=1e-9)
        )
        if not same:
            yield f"{SEQUENCES_NAME}: '{entry['key']}' ({entry['role']}) does not fit its records"


def _number_checks(records: Records, vocab_size: int) -> Iterator[tuple[str, bool]]:
    for name in ("target_ids", "head_ids", "draw_ids"):
        ids = getattr(records, f"{name}_{ {'t': 'N', 'h': 'H', 'd': 'D'}[name[0]] }")
        yield name, bool((ids >= 0).all() and (ids < vocab_size).all())
    for name in ("target_log_probs_N", "head_log_probs_H", "tail_log_mass_N"):
        values = getattr(records, name)
        yield name[:-2], bool((values <= 1e-3).all() and not np.isnan(values).any())
    yield "entropy", bool((records.entropy_N >= -1e-3).all())
    yield "log_normalisers", bool(np.isfinite(records.log_normalisers_NS).all())
    yield "draw_repeats", bool((records.draw_repeats_D >= 1).all())


def _mass_fits(encoded: dict[str, NDArray[Any]]) -> bool:
    """Whether head and tail have mass 1 at every position as stored, but for the rounding of the head's log-probs."""
    counts_N = encoded["head_counts"].astype(np.int64)
    if counts_N.sum() != len(encoded["head_ids"]) or not counts_N.all():
        return False
    log_probs_H = encoded["head_log_probs"].astype(np.float64)
    rounding = 2.0**-11 if encoded["head_log_probs"].dtype == np.float16 else 0.0
    starts_N = np.cumsum(counts_N) - counts_N
    mass_N = np.add.reduceat(np.exp(log_probs_H), starts_N) + np.exp(encoded["tail_log_mass"], dtype=np.float64)
    error_N = np.add.reduceat(np.exp(log_probs_H) * np.abs(log_probs_H) * rounding, starts_N)
    return bool((np.abs(mass_N - 1) <= error_N + _MASS_TOLERANCE).all())
