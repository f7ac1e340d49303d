"""The small JSON files of a cache, in canonical form, with the checksums that cover everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.folders import Folder
from llavamod_offline.storage.walk import walk_files

FORMAT_VERSION = 1
JOB_NAME = "job.json"
CACHE_NAME = "cache.json"
SHARDS_NAME = "shards"
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
SEQUENCES_NAME = "sequences.arrow"
COLUMNS_NAME = "columns.zarr"

COUNTS = ("sequences", "positions", "heads", "draws", "rejected")
VISUAL_COUNTS = "visual_counts"  # in a shard's manifest: how often each code of a visual advantage occurs
_READ_BYTES = 2**20
_HASHED_AT_ONCE = 4


def canonical(content: Any) -> bytes:
    """Serialise JSON in the form that checksums cover: sorted keys, two spaces, UTF-8, a final newline."""
    return (json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_bytes(content: bytes | memoryview) -> str:
    """SHA-256 as hex."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sha256_files(files: Sequence[Path]) -> list[str]:
    """SHA-256 of several large files, as hex, a few at once."""
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:
        return list(threads.map(sha256_file, files))


def content_entry(content: bytes) -> dict[str, Any]:
    """The size in bytes and the checksum of a file with this content."""
    return {"bytes": len(content), "sha256": sha256_bytes(content)}


def file_entry(file: Path) -> dict[str, Any]:
    """A file's size in bytes and its checksum."""
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of every file below `folder`, by path relative to it; none if it does not exist."""
    return {name: file_entry(folder / name) for name in sorted(walk_files(folder))} if folder.is_dir() else {}


def shard_entry(name: str, content: bytes, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a shard in cache.json, from its parsed manifest and the manifest's bytes."""
    files = manifest["files"]
    return {
        "name": name,
        "bytes": sum(entry["bytes"] for entry in files.values()) + len(content),
        "files": {MANIFEST_NAME: content_entry(content), SEQUENCES_NAME: files[SEQUENCES_NAME]},
        **{count: manifest[count] for count in COUNTS},
    }


def cache_content(
    job: Mapping[str, Any], shards: list[dict[str, Any]], files: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """All of cache.json, from `shard_entry` of every shard and the entries of the files beside it."""
    cache = {
        "format_version": FORMAT_VERSION,
        "fingerprint": job["fingerprint"],
        "shards": shards,
        "totals": {count: sum(shard[count] for shard in shards) for count in ("bytes", *COUNTS)},
        "files": dict(files),
    }
    return {**cache, "digest": content_digest(cache)}


def job_content(fingerprint: Mapping[str, Any], shard_names: Sequence[str]) -> dict[str, Any]:
    """All of job.json."""
    job = {"format_version": FORMAT_VERSION, "fingerprint": dict(fingerprint), "shards": list(shard_names)}
    return {**job, "digest": content_digest(job)}


def way_to_finish(fingerprint: Mapping[str, Any]) -> str:
    """The command that captures, or merges, what a cache lacks."""
    if isinstance(fingerprint["data"]["digest"], list):
        return "`cache-teacher merge` of the same caches"
    return "`cache-teacher run` with the same settings"


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of job.json or cache.json without the digest itself.

    Through its checksums, the digest of cache.json covers the whole cache.
    """
    return sha256_bytes(canonical({name: value for name, value in content.items() if name != "digest"}))


def has_own_digest(content: bytes, parsed: Mapping[str, Any]) -> bool:
    """Whether a job.json or cache.json, given as bytes and parsed, contains the digest of its content."""
    digest = parsed.get("digest")
    # In canonical form the digest has its own line; removing that is faster than serialising the rest.
    line = f'\n  "digest": "{digest}",\n'.encode()
    if content.count(line) == 1 and sha256_bytes(content.replace(line, b"\n")) == digest:
        return True
    return digest == content_digest(parsed)


def cache_bytes(cache: Mapping[str, Any], own_bytes: int | None = None) -> int:
    """The bytes of all files of a cache, from its parsed cache.json and, if known, that file's size."""
    sizes = [cache["totals"]["bytes"], *(entry["bytes"] for entry in cache["files"].values())]
    return sum(map(int, sizes)) + (len(canonical(cache)) if own_bytes is None else own_bytes)


def read_object(folder: Folder, name: str, *, way_out: str) -> dict[str, Any]:
    """Read a JSON object of this format version. Errors: `CacheError` naming the file, ending with `way_out`."""
    where = f"{folder.where}/{name}"
    try:
        content = folder.read(name)
    except FileNotFoundError as error:
        raise CacheError(f"{where}: missing: {way_out}") from error
    except OSError as error:
        raise CacheError(f"{where}: cannot be read: {error.strerror or error}: {way_out}") from error
    return parse_object(content, where, way_out=way_out)


def parse_object(content: bytes, where: str, *, way_out: str) -> dict[str, Any]:
    """Parse a JSON object of this format version. Errors: `CacheError` starting with `where`, ending with `way_out`."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{where}: cannot be read: {error}: {way_out}") from error
    if not isinstance(parsed, dict):
        raise CacheError(f"{where}: not a JSON object: {way_out}")
    version = parsed.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(f"{where}: format version {version}, not {FORMAT_VERSION}: update the project to read it")
    return parsed
