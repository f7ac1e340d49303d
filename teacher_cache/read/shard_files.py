"""Local files of an open cache's shards: those of the cache itself, or copies of remote ones.

A remote cache's sequence tables are copied together when it is opened, its columns shard by shard when first read;
every file is checked against its checksum in cache.json or the shard's manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, overload

import pyarrow as pa

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.folders import LocalFolder
from llavamod_offline.storage.remote import RemoteFolder, Wanted
from teacher_cache.format.manifest import (
    CACHE_NAME,
    COLUMNS_NAME,
    MANIFEST_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    parse_object,
    sha256_bytes,
)
from teacher_cache.format.sequences import map_file, parse_sequences

VERIFY = "run `cache-teacher verify`"
Entry = Mapping[str, Any]


class ShardFiles(Protocol):
    """The files of a cache's shards."""

    def folder(self, shard: int) -> Path:
        """Where a shard's manifest and columns are while `hold` is active."""
        ...

    def tables(self) -> list[pa.RecordBatch]:
        """Open the table of every shard. Errors: `CacheError` if one is missing or damaged; `StorageError`."""
        ...

    def table(self, shard: int) -> pa.RecordBatch:
        """Open the table of one shard. Errors: as `tables`."""
        ...

    def hold(self, shard: int) -> AbstractContextManager[object]:
        """Keep a shard's columns on this machine. Errors: `CacheError` if a file is damaged; `StorageError`."""
        ...


class LocalShards:
    """The shards of a local cache."""

    def __init__(self, folder: LocalFolder, shards: Sequence[Entry]) -> None:
        self._shards = shards
        self._path = folder.path / SHARDS_NAME

    def folder(self, shard: int) -> Path:
        """See `ShardFiles`."""
        return self._path / str(self._shards[shard]["name"])

    def tables(self) -> list[pa.RecordBatch]:
        """See `ShardFiles`."""
        return [self.table(shard) for shard in range(len(self._shards))]

    def table(self, shard: int) -> pa.RecordBatch:
        """See `ShardFiles`."""
        return _checked_table(self.folder(shard) / SEQUENCES_NAME, self._shards[shard])

    def hold(self, shard: int) -> AbstractContextManager[object]:
        """See `ShardFiles`."""
        return nullcontext()


class StagedShards:
    """The shards of a remote cache, copied to this machine."""

    def __init__(self, folder: RemoteFolder, shards: Sequence[Entry], digest: str, staging: DiskCache) -> None:
        self._folder = folder
        self._shards = shards
        self._digest = digest
        self._staging = staging

    def folder(self, shard: int) -> Path:
        """See `ShardFiles`."""
        return self._staging.path(self._unit(shard))

    def _unit(self, shard: int) -> str:
        return f"columns-{self._shards[shard]['files'][MANIFEST_NAME]['sha256']}"

    def tables(self) -> list[pa.RecordBatch]:
        """See `ShardFiles`. A mapped table stays readable after its file is removed."""
        entries = [shard["files"][SEQUENCES_NAME] for shard in self._shards]
        names = [f"{SHARDS_NAME}/{shard['name']}/{SEQUENCES_NAME}" for shard in self._shards]

        def fill(aside: Path) -> None:
            self._fetch((name, aside / name, entry) for name, entry in zip(names, entries, strict=True))

        size = sum(entry["bytes"] for entry in entries)
        with self._staging.hold(f"tables-{self._digest}", size, fill) as unit:
            return [_checked_table(unit / name, shard) for name, shard in zip(names, self._shards, strict=True)]

    def table(self, shard: int) -> pa.RecordBatch:
        """See `ShardFiles`."""
        about = self._shards[shard]
        entry = about["files"][SEQUENCES_NAME]
        name = f"{SHARDS_NAME}/{about['name']}/{SEQUENCES_NAME}"

        def fill(aside: Path) -> None:
            self._fetch([(name, aside / SEQUENCES_NAME, entry)])

        with self._staging.hold(f"table-{entry['sha256']}", entry["bytes"], fill) as unit:
            return _checked_table(unit / SEQUENCES_NAME, about)

    def hold(self, shard: int) -> AbstractContextManager[object]:
        """See `ShardFiles`."""
        folder = f"{SHARDS_NAME}/{self._shards[shard]['name']}"

        def fill(aside: Path) -> None:
            name = f"{folder}/{MANIFEST_NAME}"
            self._fetch([(name, aside / MANIFEST_NAME, self._shards[shard]["files"][MANIFEST_NAME])])
            manifest = checked_manifest((aside / MANIFEST_NAME).read_bytes(), name, self._shards[shard])
            self._fetch((f"{folder}/{file}", aside / file, entry) for file, entry in column_files(manifest).items())

        return self._staging.hold(self._unit(shard), self._shards[shard]["bytes"], fill)

    def _fetch(self, files: Iterable[tuple[str, Path, Entry]]) -> None:
        """Download files, given by name, local path and entry, and check them."""
        wanted = [Wanted(name, path, entry["bytes"], entry["sha256"]) for name, path, entry in files]
        try:
            damaged = self._folder.fetch(wanted)
        except FileNotFoundError as error:
            raise CacheError(f"{error.filename or self._folder.where}: missing: {VERIFY}") from error
        if damaged:
            raise CacheError(f"{self._folder.where}/{damaged[0]}: damaged (wrong checksum): {VERIFY}")


class Manifests(Sequence[Mapping[str, Any]]):
    """The shards' manifests, read on access, with only the columns among their files.

    Errors on access: `CacheError` if a manifest is missing or damaged.
    """

    def __init__(self, folder: Callable[[int], Path], shards: Sequence[Entry]) -> None:
        self._folder = folder
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, shard: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, shard: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, shard: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(len(self)))]
        file = self._folder(shard) / MANIFEST_NAME
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CacheError(f"{file}: cannot be read: {error.strerror or error}: {VERIFY}") from error
        manifest = checked_manifest(content, str(file), self._shards[shard])
        return {**manifest, "files": column_files(manifest)}


def checked_manifest(content: bytes, where: str, shard: Entry) -> dict[str, Any]:
    """Parse a manifest. Errors: `CacheError` naming it by `where`, if its checksum is not that in cache.json."""
    if sha256_bytes(content) != shard["files"][MANIFEST_NAME]["sha256"]:
        raise CacheError(f"{where}: its checksum is not the one in {CACHE_NAME}: {VERIFY}")
    return parse_object(content, where, way_out=VERIFY)


def column_files(manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries of a manifest for files of columns."""
    return {name: entry for name, entry in manifest["files"].items() if name.startswith(f"{COLUMNS_NAME}/")}


def _checked_table(file: Path, shard: Entry) -> pa.RecordBatch:
    content = map_file(file) if file.is_file() else None
    if content is None or sha256_bytes(memoryview(content)) != shard["files"][SEQUENCES_NAME]["sha256"]:
        raise CacheError(f"{file}: missing, or its checksum is not the one in {CACHE_NAME}: {VERIFY}")
    table = parse_sequences(content, file)
    if len(table) != shard["sequences"]:
        raise CacheError(f"{file}: has {len(table)} sequences, {CACHE_NAME} lists {shard['sequences']}: {VERIFY}")
    return table
