"""A file behind a URL, read by position like one on a disk."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast
from urllib.parse import urlsplit

from llavamod_offline.errors import StorageError
from llavamod_offline.storage.remote import RemoteFolder

_BUFFER = 2**22  # bytes per request, unless more are wanted at once


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL; `suffix` and `stem` are like a `Path`'s, without a web address's query."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(urlsplit(self.url).path or self.url).name

    @property
    def suffix(self) -> str:
        """Its last suffix, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """Its name without the last suffix."""
        return PurePosixPath(self.name).stem

    def size(self) -> int:
        """Its size in bytes. Errors: `StorageError`, also if it is missing or the server does not report its size."""
        folder, name = self.parts()
        try:
            size = folder.size(name)
        except FileNotFoundError as error:
            raise StorageError(f"{self.url}: no such file, or its server does not answer: check the address") from error
        if not size:
            raise StorageError(f"{self.url}: is empty, or its server does not report its size")
        return size

    def open(self) -> IO[bytes]:
        """Open it for reading at any position; the bytes are requested as they are needed. Errors: `StorageError`."""
        return cast("IO[bytes]", io.BufferedReader(_Ranges(self, self.size()), _BUFFER))

    def parts(self) -> tuple[RemoteFolder, str]:
        """Its folder, and its name there."""
        parent, _, name = self.url.rpartition("/")
        return RemoteFolder(parent), name


Place = Path | RemoteFile


def open_place(place: Place) -> IO[bytes]:
    """Open a local or remote file for reading. Errors: `OSError`, `StorageError`."""
    return place.open("rb") if isinstance(place, Path) else place.open()


def place_size(place: Place) -> int:
    """The size of a local or remote file in bytes. Errors: `OSError`, `StorageError`."""
    return place.stat().st_size if isinstance(place, Path) else place.size()


class _Ranges(io.RawIOBase):
    """Reads a remote file range by range, retrying as `RemoteFolder` does."""

    def __init__(self, file: RemoteFile, size: int) -> None:
        self._file, self._size, self._position = file, size, 0
        self._folder, self._name = file.parts()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        try:
            content = self._folder.read(self._name, self._position, stop)
        except FileNotFoundError as error:
            raise StorageError(f"{self._file}: was removed while it was being read") from error
        if not content:
            raise StorageError(f"{self._file}: ends at byte {self._position} of {self._size}: try again")
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
