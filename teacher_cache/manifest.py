"""The small JSON files of a cache, in one canonical form, with the checksums that tie everything together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamod_offline.errors import CacheError

FORMAT_VERSION = 1
JOB_NAME = "job.json"
CACHE_NAME = "cache.json"
SHARDS_NAME = "shards"
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
SEQUENCES_NAME = "sequences.arrow"
COLUMNS_NAME = "columns.zarr"

COUNTS = ("sequences", "positions", "heads", "draws", "rejected")
_READ_BYTES = 2**20


def canonical(content: Any) -> bytes:
    """Serialise JSON in the one form that checksums cover: keys sorted, two spaces, UTF-8, a newline at the end."""
    return (json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_bytes(content: bytes) -> str:
    """SHA-256 as hex."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, as hex, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def file_entry(file: Path) -> dict[str, Any]:
    """A file's size in bytes and its checksum."""
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of every file below `folder`, by path relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file_entry(file) for file in files}


def cache_digest(cache: Mapping[str, Any]) -> str:
    """SHA-256 of all of cache.json but the digest itself; through the checksums in it, of the whole cache."""
    return sha256_bytes(canonical({name: value for name, value in cache.items() if name != "digest"}))


def read_object(file: Path, *, way_out: str) -> dict[str, Any]:
    """Read a JSON object of this format version. Errors: `CacheError` naming the file, ending with the way out."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CacheError(f"{file}: missing: {way_out}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{file}: cannot be read: {error}: {way_out}") from error
    if not isinstance(content, dict):
        raise CacheError(f"{file}: not a JSON object: {way_out}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(f"{file}: format version {version}, this version of the project reads {FORMAT_VERSION}")
    return content
