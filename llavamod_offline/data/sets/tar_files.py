"""The bytes of a set's tars, read by position from disk, or from local copies of remote tars.

The first read of a remote tar copies it into the disk cache and checks its size and SHA-256; if only a few of its
samples are needed, only their bytes are fetched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.errors import DataError
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.remote import RemoteFolder, Wanted

# When this many tars are open, all are closed before another is opened, so that sets of thousands of shards stay below
# the usual limit of descriptors. Threads that open tars at the same time may each exceed it by one.
_MAX_OPEN = 128


@dataclass(frozen=True)
class Shard:
    """One tar of a set: its name without `.tar`, its samples, its size in bytes and its SHA-256 (hex).

    `path`: relative to the set's folder, or absolute; empty: `{name}.tar` in that folder.
    """

    name: str
    samples: int
    size: int
    sha256: str
    path: str = ""

    @property
    def again(self) -> str:
        """What to do if the tar has changed."""
        return "index the tars again" if self.path else "pack the set again"


class TarFiles:
    """The tars of a set; `places` holds the path or URL of each.

    Reads share no state, so they may come from threads, forked or spawned processes.
    Errors of every method: `DataError` naming set and shard if a tar is missing, or of another size or checksum;
    `StorageError` if a bucket cannot be read or the cache has no space for a copy.
    """

    def __init__(
        self, places: Sequence[Path | str], shards: Sequence[Shard], where: str, staging: DiskCache | None = None
    ) -> None:
        self._places, self._shards, self._where = places, shards, where
        self._open: dict[int, _OpenTar] = {}
        self._folders: dict[str, RemoteFolder] = {}
        self._staging = staging

    @property
    def staging(self) -> DiskCache:
        """The cache that holds the copies."""
        if self._staging is None:
            self._staging = DiskCache()
        return self._staging

    def is_remote(self, ordinal: int) -> bool:
        """Whether a tar is behind a URL."""
        return isinstance(self._places[ordinal], str)

    def read(self, ordinal: int, offset: int, size: int, *, scattered: bool = False) -> bytes:
        """Read bytes of a tar, fewer at its end. `scattered`: expect few reads of this tar."""
        place, shard = self._places[ordinal], self._shards[ordinal]
        if isinstance(place, Path):
            tar = self._opened(ordinal, place)  # this reference keeps it open until the bytes are here
            return os.pread(tar.descriptor, size, offset)
        if scattered and not self.staging.path(_entry_name(shard)).is_dir():
            folder, name = self._behind(place)
            try:
                return folder.read(name, offset, offset + size)
            except FileNotFoundError as error:
                raise self._missing(shard, place) from error
        with self.hold(ordinal) as entry:
            descriptor = os.open(entry / f"{shard.name}.tar", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def hold(self, ordinal: int) -> AbstractContextManager[Path]:
        """Keep the local copy of a remote tar while in the context, and download it if it is missing."""
        place, shard = self._places[ordinal], self._shards[ordinal]
        assert isinstance(place, str)
        folder, name = self._behind(place)

        def fill(aside: Path) -> None:
            try:
                damaged = folder.fetch([Wanted(name, aside / f"{shard.name}.tar", shard.size, shard.sha256)])
            except FileNotFoundError as error:
                raise self._missing(shard, place) from error
            if damaged:
                raise DataError(
                    f"set '{self._where}', shard '{shard.name}': {place} has another size or checksum than when "
                    "packed: upload or pack it again"
                )

        return self.staging.hold(_entry_name(shard), shard.size, fill)

    def _behind(self, url: str) -> tuple[RemoteFolder, str]:
        parent, name = url.rsplit("/", 1)
        if parent not in self._folders:
            self._folders[parent] = RemoteFolder(parent)
        return self._folders[parent], name

    def _missing(self, shard: Shard, url: str) -> DataError:
        return DataError(f"set '{self._where}', shard '{shard.name}': {url} is missing: upload or pack it again")

    def _opened(self, ordinal: int, path: Path) -> _OpenTar:
        opened = self._open
        tar = opened.get(ordinal)
        if tar is None:
            if len(opened) >= _MAX_OPEN:
                # A reader in another thread keeps its own reference until it is done, so its tar stays open.
                opened = self._open = {}
            tar = opened[ordinal] = _OpenTar(path, self._shards[ordinal], self._where)
        return tar


class _OpenTar:
    """An open tar; reads are positional, so that a forked process may share its descriptor."""

    def __init__(self, path: Path, shard: Shard, where: str) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"set '{where}', shard '{shard.name}': {error.strerror}: {shard.again}") from error
        size = os.fstat(self.descriptor).st_size
        if size != shard.size:
            raise DataError(f"set '{where}', shard '{shard.name}': {size} bytes instead of {shard.size}: {shard.again}")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _entry_name(shard: Shard) -> str:
    return f"tar-{shard.sha256}"
