"""Tars that others wrote, read once from the first byte to the last: their members in groups of one key.

A member's key is what stands before the first dot of its file name, folders included, as WebDataset has it; a group is
the members of one key that lie together. Nothing is ever extracted. Whatever a tar holds has one of these outcomes:

  a link, a device, a sparse file; a name that is absolute, goes through `..` or has no key or no suffix; two members of
  one name; members of one key that lie apart; a member too large → its group has a problem
  a folder → passed over
  a member cut short, a damaged header, bytes behind the end, a compressed file → a problem of the tar; what stands
  before it is good
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from llavamod_offline.data.images import MAX_ENCODED_BYTES
from llavamod_offline.data.rows import RowError

_BLOCK = 512
_PIECE = 2**20
_MAX_HEADER = 2**20  # bytes of a long name or of PAX fields
_MAX_GROUP = 2**29
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# What a damaged or hostile header makes Python's reader raise.
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, UnicodeError)


@dataclass(frozen=True)
class TarMember:
    """A file of a tar: what follows its key and a dot, where its bytes lie, and the bytes."""

    suffix: str
    offset: int
    content: bytes


@dataclass
class TarGroup:
    """The members of one key that lie together; `row` is the number of the first, `problem` says why it is unusable."""

    key: str
    row: int
    members: dict[str, TarMember] = field(default_factory=dict)
    problem: RowError | None = None

    def add(self, member: TarMember) -> None:
        """Add a member, or note why it cannot be."""
        if member.suffix in self.members:
            self.reject("bad member", f"two members are called '{self.key}.{member.suffix}'")
        elif len(member.content) + sum(len(other.content) for other in self.members.values()) > _MAX_GROUP:
            self.reject("bad member", f"its files have more than {_MAX_GROUP} bytes")
        else:
            self.members[member.suffix] = member

    def reject(self, kind: str, reason: str) -> None:
        """Note why the group is unusable; the first reason counts. What was read is let go."""
        self.members.clear()
        self.problem = self.problem or RowError(kind, reason)  # type: ignore[arg-type]


class TarReader:
    """Reads one tar; its `size`, `sha256` and `problem`, and how many `rows` (members) it has, are known at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.sha256 = ""
        self.problem: RowError | None = None
        self.rows = 0

    def groups(self) -> Iterator[TarGroup]:
        """The groups in the order of the tar. Errors: `OSError` of the disk."""
        with self.path.open("rb") as stream:
            self.size = os.fstat(stream.fileno()).st_size
            bytes_read = _Hashed(stream, self.size)
            group: TarGroup | None = None
            for key, suffix, member in self._members(stream, bytes_read):
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = TarGroup(key, self.rows)
                self.rows += 1
                if isinstance(member, RowError):
                    group.reject(member.kind, str(member))
                elif group.problem is None:
                    group.add(TarMember(suffix, *member))
            if group is not None:
                yield group
            bytes_read.skip_to(self.size)
            self.sha256 = bytes_read.digest.hexdigest()

    def _members(self, stream: BinaryIO, read: _Hashed) -> Iterator[tuple[str, str, tuple[int, bytes] | RowError]]:
        """Key, suffix and place and bytes of each member, or what is wrong with it."""
        end = 0  # of what is understood
        try:
            start = os.pread(stream.fileno(), 8, 0)
            packer = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
            if packer:
                self._damaged(f"is compressed with {packer}, so that nothing in it can be found by position: unpack it")
                return
            tar = tarfile.TarFile(fileobj=_Headers(stream), mode="r", errorlevel=0, errors="surrogateescape")
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header until the end
                key, suffix, problem = split_name(header.name)
                if header.size < 0 or header.offset_data < end:
                    self._damaged(f"has a header at byte {header.offset} that makes no sense")
                    return
                plain = header.isreg() and not header.issparse()
                end = tar.offset
                if header.isdir() and problem is None:
                    continue
                if header.isreg() and header.offset_data + header.size > self.size:
                    there = max(0, self.size - header.offset_data)
                    reason = f"member '{_shown(header.name)}': {there} of its {header.size} bytes are there"
                    yield key, suffix, RowError("damaged tar", f"the tar is cut short: {reason}")
                    return
                if not plain:
                    problem = problem or RowError("bad member", f"{_kind(header)}, and no plain file")
                elif header.size > MAX_ENCODED_BYTES:
                    problem = problem or RowError("bad member", f"{header.size} bytes, more than {MAX_ENCODED_BYTES}")
                if problem is not None:
                    yield key, suffix, RowError(problem.kind, f"member '{_shown(header.name)}': {problem}")
                else:
                    yield key, suffix, (header.offset_data, read.take(header.offset_data, header.size))
        except _HEADER_ERRORS as error:
            self._damaged(f"cannot be read on from byte {end}: {error or type(error).__name__}")
            return
        self._check_end(stream, end)

    def _check_end(self, stream: BinaryIO, end: int) -> None:
        """A tar ends with zeros: Python's reader takes anything that is no header for the end."""
        place = end
        while piece := os.pread(stream.fileno(), _PIECE, place):
            if piece.count(0) != len(piece):
                self._damaged(f"has something at byte {end} that is neither a member nor its end")
                return
            place += len(piece)
        if end == 0:
            self._damaged("has no members" if self.size else "is empty")

    def _damaged(self, reason: str) -> None:
        self.problem = RowError("damaged tar", f"the tar {reason}")


class _Hashed:
    """A file's bytes, taken in rising order, hashed on the way."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._descriptor = stream.fileno()
        self._size = size
        self._position = 0
        self.digest = hashlib.sha256()

    def take(self, offset: int, size: int) -> bytes:
        self.skip_to(offset)
        content = os.pread(self._descriptor, size, offset)
        self.digest.update(content)
        self._position = offset + len(content)
        return content

    def skip_to(self, offset: int) -> None:
        while self._position < min(offset, self._size):
            piece = os.pread(self._descriptor, min(_PIECE, offset - self._position), self._position)
            if not piece:
                return
            self.digest.update(piece)
            self._position += len(piece)


class _Headers(io.RawIOBase):
    """A file for reading headers from; none may claim to be so long that reading it fills the memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def split_name(name: str) -> tuple[str, str, RowError | None]:
    """A member's key and suffix, and what is wrong with its name."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    problem = None
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        problem = RowError("bad member", "its name leads out of the folder that it would be unpacked in")
    elif not stem or not suffix:
        problem = RowError("bad member", "its name is no key, a dot and a suffix")
    return f"{folder}{slash}{stem}" if stem else name, suffix.lower(), problem


def _kind(header: tarfile.TarInfo) -> str:
    if header.issym() or header.islnk():
        return f"a link to '{_shown(header.linkname)}'"
    if header.isdir():
        return "a folder"
    if header.ischr() or header.isblk() or header.isfifo():
        return "a device"
    return "a sparse file" if header.issparse() else f"of type {header.type!r}"


def _shown(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}…"
