"""Folders behind a URL (`s3://`, `gs://`, `memory://` …), read and written by fsspec.

An object store has no rename, so a folder is committed by its last file: all others are uploaded before it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llavamod_offline.errors import StorageError
from llavamod_offline.staging import DISK_ERRORS, scratch

_T = TypeVar("_T")
_AT_ONCE = 32
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub"}


class RemoteFolder:
    """A folder behind a URL. Safe in threads, after a fork, and in spawned processes.

    Names are relative to the folder, with `/`. Errors of every method: `StorageError` if the bucket is missing, refuses
    or cannot be reached; `FileNotFoundError` if a file is missing; `OSError` of the local disk.
    """

    def __init__(self, url: str) -> None:
        self.where = url if url.endswith("://") else url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return (RemoteFolder, (self.where,))

    def read(self, name: str) -> bytes:
        """Read one file."""
        with self._errors(name, "read"):
            content: bytes = self._files.cat_file(self._full(name))
            return content

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        """Read many files at once, in the order of the names."""
        return self._at_once(self.read, names)

    def names(self) -> set[str]:
        """The names of the files and folders right below the folder; none if there is no such folder."""
        with self._errors("", "listed"):
            self._files.invalidate_cache()
            try:
                entries = self._files.ls(self._root, detail=False)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                entries = []
        return {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries} - {""}

    def sizes(self, below: str = "") -> dict[str, int]:
        """The sizes in bytes of all files at any depth below `below`, by name relative to it."""
        with self._errors(below, "listed"):
            self._files.invalidate_cache()
            root = self._full(below)
            found = self._files.find(root, detail=True)
        return {
            path[len(root) :].lstrip("/"): int(entry["size"] or 0)
            for path, entry in found.items()
            if path.startswith(f"{root}/") and not path.endswith("/")
        }

    def write(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all."""
        with self._errors(name, "written"):
            self._files.pipe_file(self._full(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a new file; gives False, and changes nothing, if it is there."""
        with self._errors(name, "written"):
            try:
                self._files.pipe_file(self._full(name), content, mode="create")
            except FileExistsError:
                return False
            except Exception as error:  # stores that know no conditional write
                if not (isinstance(error, NotImplementedError | TypeError) or "NotImplemented" in str(error)):
                    raise
                if self._files.exists(self._full(name)):
                    return False
                self._files.pipe_file(self._full(name), content)
        return True

    @contextmanager
    def commit(self, name: str, last: str) -> Iterator[Path]:
        """Yield a local folder to fill; at the end it is uploaded as `name`, its file `last` at the very last.

        Errors: `FileExistsError` if another process has written `name` meanwhile, and not the same.
        """
        with scratch() as folder:
            yield folder
            if not self._upload(folder, name, last):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.where}/{name}")

    @contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        """Yield a local folder with all that is below `name`, for reading alone."""
        with scratch() as folder:
            self.download({f"{name}/{file}": folder / file for file in self.sizes(name)})
            yield folder

    def download(self, names: Mapping[str, Path]) -> None:
        """Download files to local paths, whose folders are made."""
        for folder in {path.parent for path in names.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        with self._errors(next(iter(names), ""), "read"):
            try:
                self._files.get([self._full(name) for name in names], [str(path) for path in names.values()])
            except FileNotFoundError as error:  # backends do not say of which
                lost = next((name for name in names if not self._files.exists(self._full(name))), None)
                if lost is None:
                    raise
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.where}/{lost}") from error

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there do not matter."""
        self._at_once(self._remove_file, names)

    def remove(self, name: str, first: str) -> None:
        """Remove the folder `name`, its file `first` before all others."""
        self._remove_file(f"{name}/{first}")
        self.remove_files([f"{name}/{file}" for file in self.sizes(name)] or [name])

    def clear_leftovers(self, name: str) -> list[str]:
        """Nothing to do: a file that is being written is not seen."""
        return []

    def _upload(self, folder: Path, name: str, last: str) -> bool:
        """Send all of `folder`, `last` once all others are there and nothing else; False if another `last` is there."""
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        content = files.pop(last).read_bytes()
        with self._errors(name, "written"):
            sent = [str(path) for path in files.values()]
            self._files.put(sent, [self._full(f"{name}/{file}") for file in files])
        there = self.sizes(name)
        self.remove_files(f"{name}/{stray}" for stray in there.keys() - files.keys() - {last})
        lost = sorted(file for file, path in files.items() if there.get(file) != path.stat().st_size)
        if lost:
            raise StorageError(f"{self.where}/{name}/{lost[0]}: was not stored whole: run again to upload it")
        return self.create(f"{name}/{last}", content) or self.read(f"{name}/{last}") == content

    def _remove_file(self, name: str) -> None:
        with self._errors(name, "removed"):
            try:
                self._files.rm_file(self._full(name))
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise

    def _at_once(self, function: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return list(threads.map(function, names))

    @property
    def _files(self) -> Any:
        return self._open()[0]

    @property
    def _root(self) -> str:
        return self._open()[1]

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _open(self) -> tuple[Any, str]:
        """The file system and the folder's path in it; opened anew after a fork, as its threads are gone then."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                files, root = url_to_fs(self.where)
            except ImportError as error:
                raise StorageError(f"{self.where}: {_reason(error)}: {_install(self.where)}") from error
            except (ValueError, OSError) as error:
                raise StorageError(f"{self.where}: cannot be opened: {_reason(error)}") from error
            if not root.strip("/"):
                raise StorageError(f"{self.where}: names no bucket or folder: give one, such as s3://bucket/folder")
            self._opened = (os.getpid(), files, root.rstrip("/"))
        return self._opened[1:]

    @contextmanager
    def _errors(self, name: str, done: str) -> Iterator[None]:
        """Turn what a backend raises, which may be anything, into the errors that are documented."""
        where = f"{self.where}/{name}" if name else self.where
        try:
            yield
        except FileNotFoundError as error:
            if _no_bucket(error):
                raise StorageError(f"{self.where}: there is no such bucket: make it, or correct the name") from error
            raise
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            refused = isinstance(error, PermissionError) or "Credential" in type(error).__name__
            way_out = "check the credentials and what they allow" if refused else "check the network and try again"
            raise StorageError(f"{where}: cannot be {done}: {_reason(error)}: {way_out}") from error


def _no_bucket(error: FileNotFoundError) -> bool:
    return "bucket does not exist" in str(error).lower() or "NoSuchBucket" in repr(error.__cause__)


def _install(url: str) -> str:
    scheme = url.split("://", 1)[0].rsplit(":", 1)[-1]
    if scheme in _EXTRAS:
        return f"pip install 'llavamod-offline[{_EXTRAS[scheme]}]'"
    return f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else "install that package"


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
