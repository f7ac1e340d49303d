"""Local copies of remote files: complete or absent, bounded in bytes, shared by all processes of a machine.

    ID/          an entry: a folder, complete as soon as it has this name; never changed
    ID.lock      its size in bytes; readers lock it shared, whoever makes or removes the entry locks it exclusively;
                 its modification time is the time of last use
    ID.tmp/      the entry being made
    .lock        held while space is freed

An entry is named by a checksum of its content, so that all readers of the same bytes share it. The environment variable
LLAVAMOD_STAGING names the folder (default: `llavamod-offline/staging` in the user's cache folder), LLAVAMOD_STAGING_GB
its size limit in gigabytes (default 20). Least recently used entries are removed first. Our own code, because no
library offers a cache that is bounded, verified, and locked between processes.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llavamod_offline.errors import ConfigError, StorageError
from llavamod_offline.storage import atomic

FOLDER_VARIABLE = "LLAVAMOD_STAGING"
SIZE_VARIABLE = "LLAVAMOD_STAGING_GB"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # raised by a disk, never by a network
_DEFAULT_GB = 20.0
_IDENTITY = re.compile(r"[0-9a-z-]+")
_PAUSE_SECONDS = 0.02


def staging_folder() -> Path:
    """The folder that holds copies of remote files on this machine."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    home = (
        Path("~/Library/Caches") if sys.platform == "darwin" else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    )
    return home.expanduser() / "llavamod-offline" / "staging"


def staging_bytes() -> int:
    """The limit of that folder in bytes. Errors: `ConfigError` if the variable is not a positive number."""
    text = os.environ.get(SIZE_VARIABLE)
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
    except ValueError:
        gigabytes = 0.0
    if not 0.0 < gigabytes < 1e9:
        raise ConfigError(f"{SIZE_VARIABLE}: '{text}' is not a positive number of gigabytes: set it to one, such as 20")
    return int(gigabytes * 1e9)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a new folder beside the entries and remove it afterwards; the next process clears up after a killed one.

    Errors: `StorageError` if the folder cannot be made, or if the disk fills up while it is in use.
    """
    root = staging_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_scratch(root, os.getpid())
        folder = atomic.aside_path(root / f"scratch.{uuid.uuid4().hex[:12]}")
        folder.mkdir()
    except OSError as error:
        raise _unusable(root, error) from error
    try:
        yield folder
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise _unusable(root, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class DiskCache:
    """Cached entries in a folder, at most `limit_bytes` in total (defaults: see above).

    Safe in threads, after forks, and between processes. The folder is created with the first entry.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = (folder or staging_folder()).absolute()
        self.limit_bytes = staging_bytes() if limit_bytes is None else limit_bytes

    def path(self, identity: str) -> Path:
        """The folder of an entry, whether it exists yet or not."""
        return self.folder / identity

    @contextmanager
    def hold(self, identity: str, size: int, fill: Callable[[Path], None]) -> Iterator[Path]:
        """Yield an entry's folder, which stays while it is held; if it is missing, `fill` makes its content.

        `size`: the bytes that `fill` writes. Hold one entry at a time, and briefly: when the cache is full, a process
        waits until others release theirs.
        Errors: `StorageError` if the entry is larger than the limit, or the disk is full; whatever `fill` raises.
        """
        if not _IDENTITY.fullmatch(identity):
            raise ValueError(f"'{identity}' cannot name an entry")
        if size > self.limit_bytes:
            raise StorageError(
                f"{self.folder}: {size:,} bytes exceed the limit of {self.limit_bytes:,}: raise {SIZE_VARIABLE}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        entry = self.path(identity)
        while True:
            with self._locked(identity, exclusive=False) as lock:
                if lock is not None and entry.is_dir():
                    os.utime(lock)
                    yield entry
                    return
            # Never wait for an exclusive lock: whoever holds an entry may be waiting for another one.
            with self._locked(identity, exclusive=True) as lock:
                if lock is not None and not entry.is_dir() and self._reserve(identity, lock, size):
                    self._make(entry, fill)
                    continue
            time.sleep(_PAUSE_SECONDS)

    def _make(self, entry: Path, fill: Callable[[Path], None]) -> None:
        aside = entry.with_name(f"{entry.name}.tmp")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            fill(aside)
            aside.rename(entry)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _unusable(self.folder, error) from error
            raise

    def _reserve(self, identity: str, lock: int, size: int) -> bool:
        """Write the entry's size into its lock file, if there is enough space or it can be freed."""
        try:
            with (self.folder / ".lock").open("a") as whole:
                fcntl.flock(whole, fcntl.LOCK_EX)
                if not self._free_space(identity, size):
                    return False
                os.truncate(lock, 0)
                os.pwrite(lock, str(size).encode(), 0)
                return True
        except OSError as error:
            raise _unusable(self.folder, error) from error

    def _free_space(self, identity: str, size: int) -> bool:
        entries = []
        for file in self.folder.glob("*.lock"):
            if file.stem not in ("", identity) and file.name != ".lock":
                with suppress(OSError, ValueError):
                    entries.append((file.stat().st_mtime_ns, file.stem, int(file.read_text() or "0")))
        taken = sum(entry_size for _, _, entry_size in entries)
        for _, other, other_size in sorted(entries):
            if taken + size <= self.limit_bytes:
                break
            with self._locked(other, exclusive=True) as lock:
                if lock is not None:  # no one reads or makes it
                    for name in (other, f"{other}.tmp"):
                        shutil.rmtree(self.folder / name, ignore_errors=True)
                    (self.folder / f"{other}.lock").unlink(missing_ok=True)
                    taken -= other_size
        return taken + size <= self.limit_bytes

    @contextmanager
    def _locked(self, identity: str, *, exclusive: bool) -> Iterator[int | None]:
        """Lock an entry: shared, waiting until it is made; or exclusively, without waiting (None if others hold it)."""
        file = self.folder / f"{identity}.lock"
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            except BlockingIOError:
                yield None
                return
            except OSError as error:  # a file system without locks
                raise _unusable(self.folder, error) from error
            try:
                yield lock if _is_file(lock, file) else None
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process shares the lock, so closing is not enough
        finally:
            os.close(lock)


def _is_file(lock: int, file: Path) -> bool:
    """Whether a lock is on the current file: another process may have removed the entry before we locked it."""
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _clear_scratch(root: Path, process: int) -> None:
    """Remove the scratch folders of killed processes, once in each process."""
    atomic.remove_leftovers(root, "scratch")


def _unusable(folder: Path, error: OSError) -> StorageError:
    reason = f"{error.strerror or error}"
    more = f", or a smaller {SIZE_VARIABLE}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StorageError(f"{folder}: cannot be used: {reason}: set {FOLDER_VARIABLE} to another folder{more}")
