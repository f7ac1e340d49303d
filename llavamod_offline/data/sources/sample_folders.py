"""Folders of samples: `000.json` or `000.txt` beside `000.jpg`, or `000.0.jpg`, `000.1.jpg`…, at any depth.

Keys are paths up to the last dot, unlike a tar's, so that names may have dots: `Shot 10.32.11.jpg` belongs to
`Shot 10.32.11.txt`. A number before that dot is an image's index if there is a text without the number.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.data.images import MAX_ENCODED_BYTES
from llavamod_offline.data.parse.members import TEXT_SUFFIXES
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources.system_files import is_system_name
from llavamod_offline.data.tars.tar_reader import TarGroup, TarMember
from llavamod_offline.errors import DataError
from llavamod_offline.storage.walk import absence, walk_files

_NUMBERED = re.compile(r"(.+)\.(0|[1-9][0-9]{0,3})", re.DOTALL)


@dataclass(frozen=True)
class FileGroup:
    """The files of one key below a folder: each one's suffix and relative name."""

    key: str
    files: tuple[tuple[str, str], ...]


def list_groups(folder: Path) -> Iterator[FileGroup]:
    """The groups of a folder, sorted by key; links to folders are followed, operating-system files skipped.

    Errors: `DataError` if there are tars, `OSError` if a folder cannot be read.
    """
    parts = {name: _split(name) for name in walk_files(folder, is_system_name)}
    tar = next((name for name, (_, suffix) in parts.items() if suffix == "tar"), None)
    if tar is not None:
        raise DataError(f"source '{folder}': holds '{tar}': index tars in place with `llavamod-offline index`")
    texts = {key for key, suffix in parts.values() if suffix in TEXT_SUFFIXES}
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, (key, suffix) in parts.items():
        numbered = None if key in texts else _NUMBERED.fullmatch(key)
        if numbered is not None and numbered[1] in texts:
            key, suffix = numbered[1], f"{numbered[2]}.{suffix}"
        groups.setdefault(key, []).append((suffix, name))
    for key in sorted(groups):
        yield FileGroup(key, tuple(sorted(groups[key], key=lambda file: file[1])))


def read_files(folder: Path, group: FileGroup) -> TarGroup:
    """Read the files of a group. Errors: `RowError` for an invalid name or an unreadable file."""
    read = TarGroup(group.key, 0)
    for suffix, name in group.files:
        path = folder / name
        try:
            status = path.stat()
            if not suffix:
                raise RowError("bad member", f"file '{name}': its name is not a key, a dot and a suffix")
            if not stat.S_ISREG(status.st_mode):
                raise RowError("bad member", f"file '{name}': not a plain file")
            if status.st_size > MAX_ENCODED_BYTES:
                raise RowError("bad member", f"file '{name}': {status.st_size} bytes, more than {MAX_ENCODED_BYTES}")
            read.add(TarMember(suffix, 0, path.read_bytes()))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}" if path.exists() else absence(path)
            raise RowError("missing image", f"file '{name}': {reason}") from error
    if read.problem is not None:
        raise read.problem
    return read


def _split(name: str) -> tuple[str, str]:
    """A file's key and suffix; no suffix if its name has none."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.rpartition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem and suffix else (name, "")
