"""Folders behind a URL (`s3://`, `gs://`, `memory://` …), read and written by fsspec.

An object store has no rename, so a folder is committed by its last file: all others are uploaded before it.

Failures of the network or of a busy store are retried, with pauses that double up to 10 s, for the number of
seconds in the environment variable LLAVAMOD_RETRY_SECONDS (default 60). Our own loop, because tenacity would not make
it shorter: the last attempt is at the deadline, only the first failure warns, and pauses do not use the shared random
generator.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llavamod_offline.errors import ConfigError, StorageError, first_line
from llavamod_offline.storage.disk_cache import DISK_ERRORS, scratch

logger = logging.getLogger(__name__)

RETRY_VARIABLE = "LLAVAMOD_RETRY_SECONDS"

_T = TypeVar("_T")
_AT_ONCE = 32
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub"}
_RETRY_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_DOWNLOADS = 3  # attempts at a file that arrives damaged
# Errors that a retry would not change. A backend may raise anything when its network fails.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    StorageError,
)
_jitter = random.Random()  # its own, so that no other random numbers depend on the network


@dataclass(frozen=True)
class Wanted:
    """A file to download to `path`, with its size in bytes and its SHA-256 (hex) where known."""

    name: str
    path: Path
    size: int | None = None
    sha256: str | None = None

    def fits(self) -> bool:
        """Whether the file at `path` is the wanted one."""
        if not self.path.is_file() or self.size not in (None, self.path.stat().st_size):
            return False
        if self.sha256 is None:
            return True
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256


def retry_seconds() -> float:
    """How long to retry a store that does not answer. Errors: `ConfigError` if the variable is not a number."""
    text = os.environ.get(RETRY_VARIABLE)
    try:
        seconds = float(text) if text else _RETRY_SECONDS
    except ValueError:
        seconds = -1.0
    if not seconds >= 0.0:
        raise ConfigError(f"{RETRY_VARIABLE}: '{text}' is not a number of seconds: set it to one, such as 60")
    return seconds


class RemoteFolder:
    """A folder behind a URL. Safe in threads, after a fork, and in spawned processes.

    Names are relative to the folder, with `/`. Errors of every method: `StorageError` if the bucket is missing, refuses
    access or cannot be reached; `FileNotFoundError` if a file is missing; `OSError` of the local disk.
    """

    def __init__(self, url: str) -> None:
        self.where = url if url.endswith("://") else url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return (RemoteFolder, (self.where,))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read one file, or its bytes `start` … `stop` − 1."""
        content = self._try(name, "read", lambda: bytes(self._files.cat_file(self._full(name), start=start, end=stop)))
        if start is not None and stop is not None and len(content) > stop - start:
            return content[start:stop]  # a web server may send the whole file regardless
        return content

    def size(self, name: str) -> int:
        """The size of one file in bytes."""
        return self._try(name, "read", lambda: int(self._files.info(self._full(name))["size"] or 0))

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        """Read many files at once, in the order of the names."""
        return self._at_once(self.read, names)

    def names(self, below: str = "") -> set[str]:
        """The names of the files and folders directly in the folder `below`; none if it does not exist."""
        root = self._full(below)

        def listed() -> list[str]:
            self._files.invalidate_cache()  # for file systems with a cache of their own
            try:
                return list(self._files.ls(root, detail=False))
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return []

        entries = self._try(below, "listed", listed)
        return {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries if str(entry).rstrip("/") != root} - {""}

    def sizes(self, below: str = "") -> dict[str, int]:
        """The sizes in bytes of all files at any depth below `below`, by name relative to it."""
        root = self._full(below)

        def listed() -> dict[str, Any]:
            self._files.invalidate_cache()
            return dict(self._files.find(root, detail=True))

        found = self._try(below, "listed", listed)
        return {
            path[len(root) :].lstrip("/"): int(entry["size"] or 0)
            for path, entry in found.items()
            if path.startswith(f"{root}/") and not path.endswith("/")
        }

    def write(self, name: str, content: bytes) -> None:
        """Write one file completely or not at all."""
        self._try(name, "written", lambda: self._files.pipe_file(self._full(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a new file; return False, and change nothing, if it exists with other content."""
        full = self._full(name)

        def made() -> bool:
            try:
                self._files.pipe_file(full, content, mode="create")
            except FileExistsError:
                # The reply to an earlier attempt, possibly one of the library's own, may have been lost.
                try:
                    return bytes(self._files.cat_file(full)) == content
                except FileNotFoundError:  # another process's, which the store shows late
                    return False
            except Exception as error:  # stores without conditional writes
                if not (isinstance(error, NotImplementedError | TypeError) or "NotImplemented" in str(error)):
                    raise
                if self._files.exists(full):
                    return False
                self._files.pipe_file(full, content)
            return True

        return self._try(name, "written", made)

    @contextmanager
    def commit(self, name: str, last: str) -> Iterator[Path]:
        """Yield a local folder to fill; at the end it is uploaded as `name`, its file `last` after all others.

        Errors: `FileExistsError` if another process has written a different `name` meanwhile, with `EBUSY` if files of
        both may be mixed.
        """
        with scratch() as folder:
            yield folder
            if not self._upload(folder, name, last):
                raise FileExistsError(errno.EBUSY, os.strerror(errno.EBUSY), f"{self.where}/{name}")

    @contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        """Yield a local, read-only folder with everything below `name`."""
        with scratch() as folder:
            self.download({f"{name}/{file}": folder / file for file in self.sizes(name)})
            yield folder

    def download(self, names: Mapping[str, Path]) -> None:
        """Download files to local paths, creating their folders."""
        for folder in {path.parent for path in names.values()}:
            folder.mkdir(parents=True, exist_ok=True)

        def got() -> None:
            try:
                self._files.get([self._full(name) for name in names], [str(path) for path in names.values()])
            except FileNotFoundError as error:  # backends do not name the file
                lost = next((name for name in names if not self._files.exists(self._full(name))), None)
                if lost is None:
                    raise
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.where}/{lost}") from error

        self._try(next(iter(names), ""), "read", got)

    def fetch(self, files: Iterable[Wanted]) -> list[str]:
        """Download and check files, damaged ones again; return the names of those that stay damaged."""
        left = list(files)
        for _ in range(_DOWNLOADS):
            self.download({file.name: file.path for file in left})
            left = [file for file in left if not file.fits()]
            if not left:
                break
        return [file.name for file in left]

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files; missing ones are ignored."""
        self._at_once(self._remove_file, names)

    def remove(self, name: str, first: str) -> None:
        """Remove the folder `name`, its file `first` before all others."""
        self._remove_file(f"{name}/{first}")
        self.remove_files([f"{name}/{file}" for file in self.sizes(name)] or [name])

    def clear_leftovers(self, name: str) -> list[str]:
        """Nothing to do: an unfinished upload is invisible."""
        return []

    def _upload(self, folder: Path, name: str, last: str) -> bool:
        """Upload `folder`, `last` after all others and with strays removed; False if a different `last` appears.

        Errors: `FileExistsError` with `EEXIST` if one is there before anything is sent.
        """
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        content = files.pop(last).read_bytes()
        if last in self.names(name):
            if self.read(f"{name}/{last}") == content:
                return True
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.where}/{name}")
        sent, targets = [str(path) for path in files.values()], [self._full(f"{name}/{file}") for file in files]
        self._try(name, "written", lambda: self._files.put(sent, targets))
        there = self.sizes(name)
        self.remove_files(f"{name}/{stray}" for stray in there.keys() - files.keys() - {last})
        lost = sorted(file for file, path in files.items() if there.get(file) != path.stat().st_size)
        if lost:
            raise StorageError(f"{self.where}/{name}/{lost[0]}: was stored incompletely: rerun to upload it")
        return self.create(f"{name}/{last}", content) or self.read(f"{name}/{last}") == content

    def _remove_file(self, name: str) -> None:
        def removed() -> None:
            try:
                self._files.rm_file(self._full(name))
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise

        self._try(name, "removed", removed)

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
        """The file system and the folder's path in it; reopened after a fork, which its threads do not survive."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs
            from fsspec.dircache import DirCache

            try:
                files, root = url_to_fs(self.where)
            except ImportError as error:
                raise StorageError(f"{self.where}: {first_line(error)}: {_install(self.where)}") from error
            except (ValueError, OSError) as error:
                raise StorageError(f"{self.where}: cannot be opened: {first_line(error)}") from error
            if not root.strip("/"):
                raise StorageError(f"{self.where}: names no bucket or folder: name one, such as s3://bucket/folder")
            if isinstance(getattr(files, "dircache", None), DirCache):
                # A cached listing hides what other processes write later, and files are read only up to their old size.
                # Not an option of `url_to_fs`: some file systems pass options that they do not know on to their server.
                files.dircache.use_listings_cache = False
                files.invalidate_cache()
            self._opened = (os.getpid(), files, root.rstrip("/"))
        return self._opened[1:]

    def _try(self, name: str, done: str, action: Callable[[], _T]) -> _T:
        """Run an action that may run twice, and retry it while the store does not answer."""
        give_up, pause = time.monotonic() + retry_seconds(), _FIRST_PAUSE
        with self._errors(name, done):
            while True:
                try:
                    return action()
                except Exception as error:
                    left = give_up - time.monotonic()
                    if _is_final(error) or left <= 0:
                        raise
                    if pause == _FIRST_PAUSE:
                        where = f"{self.where}/{name}" if name else self.where
                        logger.warning(
                            "%s: cannot be %s: %s: retrying for %.0f s", where, done, first_line(error), left
                        )
                time.sleep(min(pause * _jitter.uniform(0.5, 1.0), left))
                pause = min(2 * pause, _LONGEST_PAUSE)

    @contextmanager
    def _errors(self, name: str, done: str) -> Iterator[None]:
        """Turn whatever a backend raises into the documented errors."""
        where = f"{self.where}/{name}" if name else self.where
        try:
            yield
        except FileNotFoundError as error:
            if _no_bucket(error):
                raise StorageError(f"{self.where}: no such bucket: create it, or correct the name") from error
            raise
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            way_out = (
                "check the credentials and their permissions" if _refused(error) else "check the network and try again"
            )
            raise StorageError(f"{where}: cannot be {done}: {first_line(error)}: {way_out}") from error


def _is_final(error: Exception) -> bool:
    """Whether a retry would fail as well."""
    of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return isinstance(error, _FINAL) or of_disk or _refused(error)


def _refused(error: Exception) -> bool:
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _no_bucket(error: FileNotFoundError) -> bool:
    return "bucket does not exist" in str(error).lower() or "NoSuchBucket" in repr(error.__cause__)


def _install(url: str) -> str:
    scheme = url.split("://", 1)[0].rsplit(":", 1)[-1]
    if scheme in _EXTRAS:
        return f"pip install 'llavamod-offline[{_EXTRAS[scheme]}]'"
    return f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else "install that package"
