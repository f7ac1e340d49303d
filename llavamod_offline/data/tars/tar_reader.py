"""Read any tar once, from the first byte to the last: its members, grouped by key.

As in WebDataset, a member's key is its path up to the first dot of the file name; a group is a run of members with one
key. Nothing is extracted. Outcomes:

  a folder; a file that an operating system adds (see `system_files.py`); a link, a device or the like that is not named
  like a text or an image → skipped
  a hard link to an earlier member → that member's bytes; if its own name already has them, as when tar is given a file
  twice → skipped
  any other link, a device, a sparse file; a name that is absolute, contains `..` or has no key or no suffix; two
  members of one name; members of one key that are not adjacent; a member too large → a problem of its group
  a truncated member, a damaged header, bytes after the end, a compressed file → a problem of the tar; what precedes it
  is valid
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from llavamod_offline.data.images import MAX_ENCODED_BYTES
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources.system_files import is_system_path

_PIECE = 2**20
_MAX_HEADER = 2**20  # bytes of a long name or of PAX fields
_MAX_GROUP = 2**29
_GNU_FOLDER = b"D"  # a folder with the list of its files, in GNU tar's incremental backups
_SAMPLE_SUFFIXES = ("json", "txt", "cls", "jpg", "jpeg", "png", "webp")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Errors of Python's reader at a damaged or hostile header.
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, UnicodeError)


@dataclass(frozen=True)
class TarMember:
    """A file of a tar: what follows its key and a dot, the position of its bytes, and the bytes."""

    suffix: str
    offset: int
    content: bytes


@dataclass
class TarGroup:
    """Consecutive members of one key; `row` is the number of the first, `problem` says why the group is unusable."""

    key: str
    row: int
    members: dict[str, TarMember] = field(default_factory=dict)
    problem: RowError | None = None

    def add(self, member: TarMember) -> None:
        """Add a member, or record why that is impossible."""
        if member.suffix in self.members:
            self.reject("bad member", f"two members are named '{self.key}.{member.suffix}'")
        elif len(member.content) + sum(len(other.content) for other in self.members.values()) > _MAX_GROUP:
            self.reject("bad member", f"its files have more than {_MAX_GROUP} bytes")
        else:
            self.members[member.suffix] = member

    def reject(self, kind: str, reason: str) -> None:
        """Record why the group is unusable, unless a reason is known, and drop its members."""
        self.members.clear()
        self.problem = self.problem or RowError(kind, reason)  # type: ignore[arg-type]


class TarReader:
    """Reads one tar; its `size`, `sha256`, `problem` and number of `rows` (members) are known at the end."""

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
        """Key, suffix, position and bytes of each member, or its problem."""
        end = 0  # of the valid part
        try:
            start = os.pread(stream.fileno(), 8, 0)
            packer = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
            if packer:
                self._damaged(f"is compressed with {packer}, which rules out reading by position: unpack it")
                return
            tar = tarfile.TarFile(fileobj=_Headers(stream), mode="r", errorlevel=0, errors="surrogateescape")
            earlier: dict[str, tuple[int, int]] = {}  # offset and size of each plain member, for hard links
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header until the end
                if header.size < 0 or header.offset_data < end:
                    self._damaged(f"has an invalid header at byte {header.offset}")
                    return
                name = _plain_name(header.name)
                key, suffix, problem = _split(name)
                plain = header.isreg() and not header.issparse()
                end = tar.offset
                if header.isdir() or header.type == _GNU_FOLDER or is_system_path(name):
                    continue
                if header.isreg() and header.offset_data + header.size > self.size:
                    there = max(0, self.size - header.offset_data)
                    reason = f"member '{_shown(header.name)}': has {there} of its {header.size} bytes"
                    yield key, suffix, RowError("damaged tar", f"the tar is truncated: {reason}")
                    return
                place = (header.offset_data, header.size) if plain else None
                if header.islnk():
                    place = earlier.get(_plain_name(header.linkname))
                    if place is not None and place == earlier.get(name):
                        continue
                if place is None and not header.isreg() and suffix.rpartition(".")[2] not in _SAMPLE_SUFFIXES:
                    continue
                if place is None:
                    problem = problem or RowError("bad member", f"{_kind(header)}, not a plain file")
                elif place[1] > MAX_ENCODED_BYTES:
                    problem = problem or RowError("bad member", f"{place[1]} bytes, more than {MAX_ENCODED_BYTES}")
                else:
                    earlier[name] = place
                if problem is not None or place is None:
                    yield key, suffix, RowError("bad member", f"member '{_shown(header.name)}': {problem}")
                elif plain:
                    yield key, suffix, (place[0], read.take(*place))
                else:
                    yield key, suffix, (place[0], os.pread(stream.fileno(), place[1], place[0]))
        except _HEADER_ERRORS as error:
            self._damaged(f"cannot be read from byte {end} on: {error or type(error).__name__}")
            return
        self._check_end(stream, end)

    def _check_end(self, stream: BinaryIO, end: int) -> None:
        """Check that zeros follow: Python's reader treats anything but a header as the end."""
        place = end
        while piece := os.pread(stream.fileno(), _PIECE, place):
            if piece.count(0) != len(piece):
                self._damaged(f"has data at byte {end} that is neither a member nor its end")
                return
            place += len(piece)
        if end == 0:
            self._damaged("has no members" if self.size else "is empty")

    def _damaged(self, reason: str) -> None:
        self.problem = RowError("damaged tar", f"the tar {reason}")


class _Hashed:
    """A file's bytes, read in increasing order and hashed."""

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
    """A file for reading headers; refuses headers so long that they would exhaust memory."""

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


def _plain_name(name: str) -> str:
    """A member's name without its empty and `.` parts."""
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


def _split(name: str) -> tuple[str, str, RowError | None]:
    """A member's key and suffix, and the problem with its name, if any."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    problem = None
    if name.startswith("/") or ".." in name.split("/"):
        problem = RowError("bad member", "its name leads out of the folder it would be unpacked into")
    elif not stem or not suffix:
        problem = RowError("bad member", "its name is not a key, a dot and a suffix")
    return f"{folder}{slash}{stem}" if stem else name, suffix.lower(), problem


def _kind(header: tarfile.TarInfo) -> str:
    if header.issym() or header.islnk():
        return f"a link to '{_shown(header.linkname)}'"
    if header.ischr() or header.isblk() or header.isfifo():
        return "a device"
    return "a sparse file" if header.issparse() else f"of type {header.type!r}"


def _shown(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}…"
