"""Folders on a disk and behind a URL, read and written in the same way."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from llavamod_offline.storage import atomic
from llavamod_offline.storage.remote import RemoteFolder
from llavamod_offline.storage.walk import walk_files

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
_LOCAL_URL = re.compile(r"(file|local)://")


class Folder(Protocol):
    """A folder. Names are relative to it, with `/`; a file appears complete, or not at all.

    Errors of every method: `OSError` of the disk, `FileNotFoundError` if a file is missing; behind a URL also
    `StorageError`.
    """

    @property
    def where(self) -> str:
        """The folder as its user names it."""
        ...

    def read(self, name: str) -> bytes:
        """Read one file."""
        ...

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        """Read many files, in the order of the names."""
        ...

    def names(self, below: str = "") -> set[str]:
        """The names of the files and folders directly in the folder `below`; none if it does not exist."""
        ...

    def sizes(self, below: str = "") -> dict[str, int]:
        """The sizes in bytes of all files at any depth below `below`, by name relative to it."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write one file."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a new file; return False, and change nothing, if it exists."""
        ...

    def commit(self, name: str, last: str) -> AbstractContextManager[Path]:
        """Yield a local folder to fill; at the end it becomes `name`, with its file `last` appearing last.

        Errors: `FileExistsError` if another process has written `name` meanwhile.
        """
        ...

    def copied(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local, read-only folder with everything below `name`."""
        ...

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files; missing ones are ignored."""
        ...

    def remove(self, name: str, first: str) -> None:
        """Remove the folder `name`, its file `first` before all others."""
        ...

    def clear_leftovers(self, name: str) -> list[str]:
        """Remove what killed writers of `name` left behind (`FOLDER/*`: of all in a folder), and return the names."""
        ...


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def where(self) -> str:
        """See `Folder`."""
        return str(self.path)

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return (self.path / name).read_bytes()

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        """See `Folder`."""
        return [self.read(name) for name in names]

    def names(self, below: str = "") -> set[str]:
        """See `Folder`."""
        try:
            return set(os.listdir(self.path / below))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def sizes(self, below: str = "") -> dict[str, int]:
        """See `Folder`."""
        root = self.path / below
        found = {}
        for file in walk_files(root) if root.is_dir() else ():
            with suppress(FileNotFoundError):  # removed or renamed by another process
                found[file] = (root / file).stat().st_size
        return found

    def write(self, name: str, content: bytes) -> None:
        """See `Folder`."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(self.path / name, content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Folder`."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        return atomic.create_file(self.path / name, content)

    @contextmanager
    def commit(self, name: str, last: str) -> Iterator[Path]:
        """See `Folder`: written under another name and renamed, so that `last` appears with all others."""
        target = self.path / name
        try:
            with atomic.new_folder(target) as folder:
                yield folder
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and target.is_dir():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            raise

    @contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        """See `Folder`: the folder itself."""
        yield self.path / name

    def remove_files(self, names: Iterable[str]) -> None:
        """See `Folder`."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def remove(self, name: str, first: str) -> None:
        """See `Folder`: renamed, then removed."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            atomic.remove_folder(path)
        else:
            path.unlink(missing_ok=True)

    def clear_leftovers(self, name: str) -> list[str]:
        """See `Folder`."""
        target = self.path / name
        removed = atomic.remove_leftovers(target.parent, target.name)
        return [path.relative_to(self.path).as_posix() for path in removed]


def is_url(where: str | Path) -> bool:
    """Whether `where` is a URL; `file://` counts as a path."""
    return isinstance(where, str) and bool(_URL.match(where)) and not _LOCAL_URL.match(where)


def absolute(where: str | Path) -> str:
    """A path or URL that means the same in other working folders."""
    folder = open_folder(where)
    return str(folder.path.resolve()) if isinstance(folder, LocalFolder) else folder.where


def open_folder(where: str | Path) -> LocalFolder | RemoteFolder:
    """A folder by path or URL; nothing is read or created. Errors: `StorageError` if no backend supports it."""
    if is_url(where):
        return RemoteFolder(str(where))
    return LocalFolder(local_path(where))


def local_path(where: str | Path) -> Path:
    """The path of a local folder, given as such or as a file:// URL."""
    return Path(_LOCAL_URL.sub("", str(where)))
