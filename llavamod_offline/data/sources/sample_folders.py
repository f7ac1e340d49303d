"""Folders of samples, as an unpacked WebDataset tar: `000.json` or `000.txt` beside `000.jpg`, at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.data.images import MAX_ENCODED_BYTES
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources.tar_reader import TarGroup, TarMember, split_name


@dataclass(frozen=True)
class FileGroup:
    """The files of one key below a folder, by their relative names; keys are formed as for a tar's members."""

    key: str
    names: tuple[str, ...]


def list_groups(folder: Path) -> Iterator[FileGroup]:
    """The groups of a folder, sorted by key; links to folders are not followed."""
    groups: dict[str, list[str]] = {}
    for root, _, names in os.walk(folder):
        below = Path(root).relative_to(folder)
        for name in names:
            path = (below / name).as_posix()
            groups.setdefault(split_name(path)[0], []).append(path)
    for key in sorted(groups):
        yield FileGroup(key, tuple(sorted(groups[key])))


def read_files(folder: Path, group: FileGroup) -> TarGroup:
    """Read the files of a group. Errors: `RowError` for an invalid name or an unreadable file."""
    read = TarGroup(group.key, 0)
    for name in group.names:
        _, suffix, problem = split_name(name)
        if problem is not None:
            raise RowError(problem.kind, f"file '{name}': {problem}")
        try:
            size = (folder / name).stat().st_size
            if size > MAX_ENCODED_BYTES:
                raise RowError("bad member", f"file '{name}': {size} bytes, more than {MAX_ENCODED_BYTES}")
            read.add(TarMember(suffix, 0, (folder / name).read_bytes()))
        except OSError as error:
            raise RowError("missing image", f"file '{name}': cannot be read: {error.strerror}") from error
    if read.problem is not None:
        raise read.problem
    return read
