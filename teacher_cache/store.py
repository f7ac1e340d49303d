"""Writing a cache: one immutable cache shard for each data shard, committed atomically; `cache.json` last.

A kill leaves committed shards and perhaps a hidden folder aside, which the next run removes. Several processes may
write one cache, each its own shards, in any order: the result is the same to the byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamod_offline import atomic
from llavamod_offline.errors import CacheError
from teacher_cache.codec import Codec
from teacher_cache.columns import write_columns
from teacher_cache.fingerprint import differences
from teacher_cache.manifest import (
    CACHE_NAME,
    COLUMNS_NAME,
    COUNTS,
    FORMAT_VERSION,
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
from teacher_cache.record import concatenate_records
from teacher_cache.sequences import SequenceRecord, sequence_table, write_sequences

_LOG = logging.getLogger(__name__)
_RUN_AGAIN = "remove the folder, or choose another output"


@dataclass(frozen=True)
class Rejection:
    """A sequence that could not be captured, and why."""

    key: str
    role: str
    reason: str


class CacheStore:
    """A cache being written. Nothing is on disk before `start`."""

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self.job = job

    @classmethod
    def open(
        cls, path: Path, fingerprint: Mapping[str, Any], shard_names: Sequence[str], *, allow: Sequence[str] = ()
    ) -> CacheStore:
        """Look at `path`: a new cache, or one to go on with; nothing is written.

        Errors: `CacheError` if the folder holds something else, or a cache of another fingerprint (differing fields
        side by side; those named in `allow` may differ).
        """
        job = {"format_version": FORMAT_VERSION, "fingerprint": dict(fingerprint), "shards": list(shard_names)}
        file = path / JOB_NAME
        if file.exists():
            there = read_object(file, way_out=_RUN_AGAIN)
            _compare(path, there, job, allow)
            return cls(path, there)
        if path.is_file() or (path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())):
            raise CacheError(f"output '{path}': exists and holds no teacher cache: choose another output")
        return cls(path, job)

    def start(self) -> None:
        """Make the folder and say in it what it will hold; clear what killed writers left. Errors: `CacheError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (JOB_NAME, CACHE_NAME, REJECTED_NAME):
                atomic.remove_leftovers(self.path, name)
            if not (self.path / JOB_NAME).exists():
                atomic.write_file(self.path / JOB_NAME, canonical(self.job))
            if self.missing():  # shards were taken away since: the cache is unfinished until they are back
                (self.path / CACHE_NAME).unlink(missing_ok=True)
            (self.path / SHARDS_NAME).mkdir(exist_ok=True)
            for name in self.job["shards"]:
                atomic.remove_leftovers(self.path / SHARDS_NAME, name)
        except OSError as error:
            raise CacheError(
                f"output '{self.path}': cannot be written: {error.strerror or error}: choose another output"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether `cache.json` is there."""
        return (self.path / CACHE_NAME).exists()

    def missing(self) -> list[str]:
        """The shards that are not committed yet, in order."""
        return [name for name in self.job["shards"] if not self._folder(name).exists()]

    def commit(
        self, name: str, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], codec: Codec
    ) -> None:
        """Write one shard, whole or not at all. Errors: `CacheError` if the disk is full or refuses."""
        target = self._folder(name)
        try:
            with atomic.new_folder(target) as folder:
                self._write_shard(folder, name, captured, rejected, codec)
        except OSError as error:
            if target.exists():
                _LOG.warning("shard %s: another process has committed it meanwhile; its copy stays", name)
                return
            raise CacheError(
                f"{target}: cannot be written: {error.strerror or error}: make room or leave, and run again to resume"
            ) from error

    def finalise(self) -> dict[str, Any]:
        """Write `rejected.jsonl` and `cache.json`, unless that is done; all shards must be committed.

        Returns the content of cache.json.
        """
        if self.complete:
            return read_object(self.path / CACHE_NAME, way_out=_RUN_AGAIN)
        shards = []
        rejected = bytearray()
        for name in self.job["shards"]:
            folder = self._folder(name)
            manifest = read_object(folder / MANIFEST_NAME, way_out="remove the shard's folder and run again")
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            shards.append(
                {
                    "name": name,
                    "bytes": size + (folder / MANIFEST_NAME).stat().st_size,
                    "manifest_sha256": sha256_file(folder / MANIFEST_NAME),
                    **{count: manifest[count] for count in COUNTS},
                }
            )
            rejected += (folder / REJECTED_NAME).read_bytes()
        try:
            atomic.write_file(self.path / REJECTED_NAME, bytes(rejected))
            cache: dict[str, Any] = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.job["fingerprint"],
                "shards": shards,
                "totals": {count: sum(shard[count] for shard in shards) for count in ("bytes", *COUNTS)},
                "files": {name: file_entry(self.path / name) for name in (JOB_NAME, REJECTED_NAME)},
            }
            cache["digest"] = cache_digest(cache)
            atomic.write_file(self.path / CACHE_NAME, canonical(cache))
        except OSError as error:
            raise CacheError(
                f"{self.path}: cannot be written: {error.strerror or error}: run again to finish"
            ) from error
        return cache

    def _folder(self, name: str) -> Path:
        return self.path / SHARDS_NAME / name

    def _write_shard(
        self,
        folder: Path,
        name: str,
        captured: Sequence[SequenceRecord],
        rejected: Sequence[Rejection],
        codec: Codec,
    ) -> None:
        records = concatenate_records([item.records for item in captured], len(codec.temperatures))
        write_columns(folder / COLUMNS_NAME, codec.encode(records), codec)
        write_sequences(folder / SEQUENCES_NAME, sequence_table(captured))
        (folder / REJECTED_NAME).write_bytes(b"".join(_rejected_line(item) for item in rejected))
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "sequences": len(captured),
            "positions": len(records),
            "heads": len(records.head_ids_H),
            "draws": len(records.draw_ids_D),
            "rejected": len(rejected),
            "files": file_entries(folder),
        }
        (folder / MANIFEST_NAME).write_bytes(canonical(manifest))


def _rejected_line(item: Rejection) -> bytes:
    row = {"key": item.key, "role": item.role, "reason": item.reason}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _compare(path: Path, there: Mapping[str, Any], job: Mapping[str, Any], allow: Sequence[str]) -> None:
    found = differences(there["fingerprint"], job["fingerprint"], allow=allow)
    if there["shards"] != job["shards"] and "data" not in allow:
        found.append(f"shards: there {len(there['shards'])}, now {len(job['shards'])}")
    if found:
        raise CacheError(
            f"output '{path}': holds a cache made from other settings: {'; '.join(found)}: "
            "choose another output, or give the same settings again"
        )
