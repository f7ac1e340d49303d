"""Writing a cache: one immutable cache shard for each data shard, committed atomically; `cache.json` last.

A killed run leaves committed shards and perhaps a hidden folder, which the next run removes, or, in an object store,
the files of a shard without its manifest, which the next run rewrites. Several processes and machines may write one
cache, each its own shards, in any order, with byte-identical results.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llavamod_offline.errors import CacheError, LlavaModError
from llavamod_offline.storage.folders import Folder, LocalFolder, open_folder
from teacher_cache.fingerprint import check_read_alike, differences, may_allow
from teacher_cache.format.columns import write_columns
from teacher_cache.format.manifest import (
    CACHE_NAME,
    COLUMNS_NAME,
    FORMAT_VERSION,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    VISUAL_COUNTS,
    cache_content,
    canonical,
    content_digest,
    content_entry,
    file_entries,
    job_content,
    parse_object,
    read_object,
    shard_entry,
)
from teacher_cache.format.record import concatenate_records
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import SequenceRecord, sequence_table, write_sequences
from teacher_cache.visual.advantages import count_codes

_LOG = logging.getLogger(__name__)
_LOOKS, _LOOK_SECONDS = 10, 0.2  # waiting for what another process has just written
_FEW_SHARDS = 8  # so many are looked up one by one, more in a listing of all
_REPAIR = "run `cache-teacher verify --repair`"
_BAD_JOB = f"{_REPAIR}, which restores it from {CACHE_NAME}; without that file, choose another output"


def begun_fingerprint(where: str | Path) -> Mapping[str, Any] | None:
    """The fingerprint of a cache that was begun at a path or URL; None if none can be read."""
    try:
        found: Mapping[str, Any] = read_object(open_folder(where), JOB_NAME, way_out=_REPAIR)["fingerprint"]
    except (OSError, KeyError, LlavaModError):
        return None  # opening it reports what is wrong
    return found


class CacheStore:
    """A cache being written, local or remote. Nothing is written before `start`."""

    def __init__(self, folder: Folder, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self.job = job
        self._committed: set[str] = set()

    @classmethod
    def open(
        cls,
        where: str | Path,
        fingerprint: Mapping[str, Any],
        shard_names: Sequence[str],
        *,
        allow: Sequence[str] = (),
    ) -> CacheStore:
        """Open a new cache, or one to continue, at a path or URL; nothing is written.

        Errors: `CacheError` if the folder contains something else, or a cache with another fingerprint (lists differing
        fields; those named in `allow` may differ); `StorageError` if a bucket cannot be used.
        """
        folder = open_folder(where)
        job = job_content(fingerprint, shard_names)
        content = _read_job(folder)
        if content is None:
            if not _occupied(folder):
                return cls(folder, job)
            content = _read_job(folder)  # another process may have begun the cache in between
        if content is None:
            raise CacheError(f"output '{folder.where}': exists but is not a teacher cache: choose another output")
        _check_folders(folder, shard_names)
        return cls(folder, _same_job(folder, content, job, allow))

    def start(self) -> None:
        """Create the folder and its job.json; remove leftovers of killed writers. Errors: `CacheError`."""
        try:
            for name in (JOB_NAME, CACHE_NAME, REJECTED_NAME, f"{SHARDS_NAME}/*"):
                self.folder.clear_leftovers(name)
            self._begin()
            # Shards were removed: unfinished until they are captured again. In this order, since another writer may
            # commit the last shard and complete the cache in between.
            if self.complete and self.missing():
                self.folder.remove_files([CACHE_NAME])
        except OSError as error:
            raise CacheError(
                f"output '{self.folder.where}': cannot be written: {error.strerror or error}: choose another output"
            ) from error

    def _begin(self) -> None:
        """Write job.json, or check that of another process: two must not write one cache with different settings."""
        for looks_left in reversed(range(_LOOKS)):
            if self.folder.create(JOB_NAME, canonical(self.job)):
                return
            try:
                content = self.folder.read(JOB_NAME)
            except FileNotFoundError:  # a store may show it late
                if not looks_left:
                    raise
                time.sleep(_LOOK_SECONDS)
            else:
                _same_job(self.folder, content, self.job, ())
                return

    @property
    def complete(self) -> bool:
        """Whether `cache.json` exists."""
        return CACHE_NAME in self.folder.names()

    def missing(self) -> list[str]:
        """The uncommitted shards, in order."""
        names: list[str] = self.job["shards"]
        self._committed |= committed_shards(self.folder, [name for name in names if name not in self._committed])
        return [name for name in names if name not in self._committed]

    @property
    def kept(self) -> str:
        """What a stopped writer has committed, for its last message; empty if nothing."""
        names: list[str] = self.job["shards"]
        done = len(names) - len(self.missing())
        return f"{done} of {len(names)} shards are in {self.folder.where}" if done else ""

    def commit(
        self, name: str, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], codec: Codec
    ) -> None:
        """Write one shard atomically. Errors: `CacheError` if it cannot be written; `StorageError`."""
        self.add(name, lambda folder: write_shard(folder, name, captured, rejected, codec))

    def add(self, name: str, fill: Callable[[Path], None]) -> None:
        """Commit one shard, whose files `fill` writes into a local folder. Errors: as `commit`."""
        shard = f"{SHARDS_NAME}/{name}"
        where = f"{self.folder.where}/{shard}"
        _check_folders(self.folder, [name])
        try:
            begun = not isinstance(self.folder, LocalFolder) and MANIFEST_NAME in self.folder.names(shard)
            faster = bool(committed_shards(self.folder, [name]))
            if not faster:
                # A manifest that was there before the look belongs to a shard with missing files; a later one may be
                # another writer's.
                if begun:
                    self.folder.remove_files([f"{shard}/{MANIFEST_NAME}"])
                with self.folder.commit(shard, MANIFEST_NAME) as folder:
                    fill(folder)
        except FileExistsError as error:
            faster = True
            if error.errno == errno.EBUSY:  # it may contain files from both
                raise CacheError(f"{where}: two processes wrote it at the same time: {_REPAIR}, then rerun") from error
        except OSError as error:
            raise _unwritable(where, error) from error
        if faster:
            _LOG.warning("shard %s: another process committed it first; keeping that copy", name)
        self._committed.add(name)

    def replace(
        self, name: str, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], codec: Codec
    ) -> None:
        """Write a shard in place of a committed one, which is removed once the new files are written beside it.

        A kill in between leaves the shard out, and the cache unfinished. Errors: as `commit`; the old shard is kept.
        """
        shard = f"{SHARDS_NAME}/{name}"
        try:
            with self.folder.commit(shard, MANIFEST_NAME) as folder:
                write_shard(folder, name, captured, rejected, codec)
                self.remove(name)
        except OSError as error:
            raise _unwritable(f"{self.folder.where}/{shard}", error) from error
        self._committed.add(name)

    def remove(self, name: str) -> None:
        """Remove a committed shard, which makes the cache unfinished: its files beside the shards go first."""
        self.folder.remove_files([CACHE_NAME, REJECTED_NAME])
        self.folder.remove(f"{SHARDS_NAME}/{name}", MANIFEST_NAME)
        self._committed.discard(name)

    def outcomes(self, among: Sequence[str] | None = None) -> tuple[int, list[Rejection]]:
        """The number of sequences in the committed shards `among` some (None: all), and their rejections.

        Errors: `CacheError`.
        """
        missing = set(self.missing())
        names = [name for name in (self.job["shards"] if among is None else among) if name not in missing]
        captured = 0
        rejected = []
        try:
            for name, content in zip(names, self._read_all(names, MANIFEST_NAME), strict=True):
                where = f"{self.folder.where}/{SHARDS_NAME}/{name}/{MANIFEST_NAME}"
                captured += int(parse_object(content, where, way_out=_REPAIR)["sequences"])
            for content in self._read_all(names, REJECTED_NAME):
                rejected += [Rejection(**json.loads(line)) for line in content.splitlines()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{self.folder.where}: a shard cannot be read ({error}): {_REPAIR}, then rerun") from error
        return captured, rejected

    def finalise(self) -> dict[str, Any]:
        """Write `rejected.jsonl` and `cache.json` if missing; all shards must be committed.

        Returns the content of cache.json.
        """
        if self.complete:
            return read_object(self.folder, CACHE_NAME, way_out=_REPAIR)
        names: list[str] = self.job["shards"]
        try:
            rejected = b"".join(self._read_all(names, REJECTED_NAME))
            shards = []
            for name, content in zip(names, self._read_all(names, MANIFEST_NAME), strict=True):
                where = f"{self.folder.where}/{SHARDS_NAME}/{name}/{MANIFEST_NAME}"
                shards.append(shard_entry(name, content, parse_object(content, where, way_out=_REPAIR)))
            job = canonical(self.job)
            self.folder.write(REJECTED_NAME, rejected)
            cache = cache_content(
                self.job, shards, {JOB_NAME: content_entry(job), REJECTED_NAME: content_entry(rejected)}
            )
            self.folder.write(CACHE_NAME, canonical(cache))
        except FileNotFoundError as error:
            raise CacheError(f"{error.filename or error}: missing: {_REPAIR}, then rerun") from error
        except OSError as error:
            raise CacheError(
                f"{self.folder.where}: cannot be written: {error.strerror or error}: rerun to finish"
            ) from error
        return cache

    def _read_all(self, names: Sequence[str], file: str) -> list[bytes]:
        return self.folder.read_all(f"{SHARDS_NAME}/{name}/{file}" for name in names)


def _unwritable(where: str, error: OSError) -> CacheError:
    return CacheError(
        f"{where}: cannot be written: {error.strerror or error}: free disk space or fix permissions, then rerun to "
        "resume"
    )


def committed_shards(folder: Folder, names: Iterable[str]) -> set[str]:
    """Which of the named shards are committed.

    Local: those whose folder exists. Remote, where nothing is renamed: those whose manifest exists, and every file
    that it names, with its size.
    """
    wanted = list(names)
    if isinstance(folder, LocalFolder):
        there = folder.names(SHARDS_NAME) if len(wanted) > _FEW_SHARDS else wanted
        return {name for name in wanted if name in there and (folder.path / SHARDS_NAME / name).is_dir()}
    shards: dict[str, dict[str, int]] = {}
    if len(wanted) <= _FEW_SHARDS:
        shards = {name: folder.sizes(f"{SHARDS_NAME}/{name}") for name in wanted}
    else:
        for file, size in folder.sizes(SHARDS_NAME).items():
            name, _, rest = file.partition("/")
            shards.setdefault(name, {})[rest] = size
    begun = [name for name in wanted if MANIFEST_NAME in shards.get(name, {})]
    manifests = folder.read_all(f"{SHARDS_NAME}/{name}/{MANIFEST_NAME}" for name in begun)
    return {name for name, content in zip(begun, manifests, strict=True) if _is_whole(content, shards[name])}


def write_shard(
    folder: Path, name: str, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], codec: Codec
) -> None:
    """Write all files of a shard into a local folder, the manifest last."""
    records = concatenate_records([item.records for item in captured], len(codec.temperatures))
    hidden = [item.hidden for item in captured if item.hidden is not None] if codec.hidden else []
    advantages = [item.advantages_N for item in captured if item.advantages_N is not None] if codec.visual else []
    advantages_N = np.concatenate([np.zeros(0, np.uint8), *advantages])
    lengths = [len(item.records) for item in captured]
    write_columns(folder / COLUMNS_NAME, records, codec, hidden, lengths, advantages_N)
    write_sequences(folder / SEQUENCES_NAME, sequence_table(captured))
    (folder / REJECTED_NAME).write_bytes(b"".join(_rejected_line(item) for item in rejected))
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "sequences": len(captured),
        "positions": len(records),
        "heads": len(records.topk_ids_H),
        "draws": len(records.tail_ids_D),
        "rejected": len(rejected),
        "files": file_entries(folder),
        **({VISUAL_COUNTS: count_codes(advantages_N).tolist()} if codec.visual else {}),
    }
    (folder / MANIFEST_NAME).write_bytes(canonical(manifest))


def _is_whole(manifest: bytes, sizes: Mapping[str, int]) -> bool:
    try:
        files = parse_object(manifest, "", way_out="")["files"]
        return all(sizes.get(name) == entry["bytes"] for name, entry in files.items())
    except (CacheError, KeyError, TypeError, AttributeError):
        return False  # partly written, by a store without atomic writes


def _rejected_line(item: Rejection) -> bytes:
    fields = {name: value for name, value in asdict(item).items() if value is not None}
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode()


def _check_folders(folder: Folder, names: Iterable[str]) -> None:
    """Refuse a file in place of the folder of shards or of one shard. Errors: `CacheError` naming it."""
    if not isinstance(folder, LocalFolder):
        return
    shards = folder.path / SHARDS_NAME
    for path in (shards, *(shards / name for name in names)):
        if path.exists() and not path.is_dir():
            raise CacheError(f"{path}: is a file, but must be a folder: remove it, or choose another output")


def _read_job(folder: Folder) -> bytes | None:
    """The bytes of job.json, None without one. Errors: `CacheError` if it cannot be read."""
    try:
        return folder.read(JOB_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CacheError(
            f"output '{folder.where}': cannot be read: {error.strerror or error}: fix its permissions"
        ) from error


def _occupied(folder: Folder) -> bool:
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        return folder.path.exists()
    return any(not name.startswith(".") for name in folder.names())


def _same_job(folder: Folder, content: bytes, job: Mapping[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """The job.json of an existing cache.

    Errors: `CacheError` if it differs from this job; `ConfigError` if `allow` has a field that decides how records are
    read, and it differs.
    """
    there = parse_object(content, f"{folder.where}/{JOB_NAME}", way_out=_BAD_JOB)
    if there.get("digest") != content_digest(there):
        raise CacheError(f"{folder.where}/{JOB_NAME}: damaged (wrong digest): {_BAD_JOB}")
    found = differences(there["fingerprint"], job["fingerprint"], allow=allow)
    counts = len(there["shards"]), len(job["shards"])
    if there["shards"] != job["shards"] and "data" not in allow and (counts[0] != counts[1] or not found):
        found.append(f"shards: was {counts[0]}, now {counts[1]}" if counts[0] != counts[1] else "shards: other names")
    if found:
        raise CacheError(
            f"output '{folder.where}': contains a cache with different settings: {'; '.join(found)}: "
            "choose another output, or use the same settings"
            + (", or pass --allow FIELD for a difference that you know to be harmless" if may_allow(found) else "")
        )
    check_read_alike(there["fingerprint"], job["fingerprint"])
    return there
