"""Local copies of remote files: complete or absent, bounded in bytes, shared by all processes of a machine.

    ID/          a unit: a folder that is complete from the moment it has this name; never changed
    ID.lock      its size in bytes; locked shared by those who read it, exclusively by who makes or removes it;
                 its time of change is that of the last use
    ID.tmp/      the unit being made
    .lock        held while room is made

A unit is named by a checksum of what it holds, so that every reader of the same bytes shares it. The folder is that of
the environment variable LLAVAMOD_STAGING, or `llavamod-offline/staging` in the user's folder for caches; its size is
LLAVAMOD_STAGING_GB gigabytes (default 20), least recently used units leave first.
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
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # those of a disk, never of a network
_DEFAULT_GB = 20.0
_IDENTITY = re.compile(r"[0-9a-z-]+")
_PAUSE_SECONDS = 0.02


def staging_folder() -> Path:
    """Where copies of remote files lie on this machine."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    home = (
        Path("~/Library/Caches") if sys.platform == "darwin" else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    )
    return home.expanduser() / "llavamod-offline" / "staging"


def staging_bytes() -> int:
    """How many bytes of copies may lie there. Errors: `ConfigError` if the variable is no positive number."""
    text = os.environ.get(SIZE_VARIABLE)
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
    except ValueError:
        gigabytes = 0.0
    if not 0.0 < gigabytes < 1e9:
        raise ConfigError(f"{SIZE_VARIABLE}: '{text}' is no number of gigabytes: set it to one, such as 20")
    return int(gigabytes * 1e9)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a new folder beside the staged units, which is removed at the end (that of a killed process by the next).

    Errors: `StorageError` if it cannot be made, or the disk is full while it is used.
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


class Staging:
    """The staged units of a folder, at most `limit_bytes` of them together (defaults: see above).

    Safe in threads, after forks, and between processes. Nothing is made before the first unit is staged.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = (folder or staging_folder()).absolute()
        self.limit_bytes = staging_bytes() if limit_bytes is None else limit_bytes

    def path(self, identity: str) -> Path:
        """Where a unit lies, or will."""
        return self.folder / identity

    @contextmanager
    def hold(self, identity: str, size: int, fill: Callable[[Path], None]) -> Iterator[Path]:
        """Yield a unit's folder, which stays while it is held; `fill` makes its content if it is not there.

        `size`: the bytes that `fill` writes. To keep the bound, hold one unit at a time, and not for long: where there
        is no room, a process waits until others let go of theirs.
        Errors: `StorageError` if the unit is larger than the bound, or the disk is full; whatever `fill` raises.
        """
        if not _IDENTITY.fullmatch(identity):
            raise ValueError(f"a unit cannot be named '{identity}'")
        if size > self.limit_bytes:
            raise StorageError(
                f"{self.folder}: {size:,} bytes are to be staged, {self.limit_bytes:,} are allowed: "
                f"set {SIZE_VARIABLE} to more"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        unit = self.path(identity)
        while True:
            with self._locked(identity, exclusive=False) as lock:
                if lock is not None and unit.is_dir():
                    os.utime(lock)
                    yield unit
                    return
            # Never wait for an exclusive lock: who holds a unit may be waiting for another one.
            with self._locked(identity, exclusive=True) as lock:
                if lock is not None and not unit.is_dir() and self._reserve(identity, lock, size):
                    self._make(unit, fill)
                    continue
            time.sleep(_PAUSE_SECONDS)

    def _make(self, unit: Path, fill: Callable[[Path], None]) -> None:
        aside = unit.with_name(f"{unit.name}.tmp")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            fill(aside)
            aside.rename(unit)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            unit.with_name(f"{unit.name}.lock").unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _unusable(self.folder, error) from error
            raise

    def _reserve(self, identity: str, lock: int, size: int) -> bool:
        """Write the unit's size into its lock file, if there is room or can be made."""
        try:
            with (self.folder / ".lock").open("a") as whole:
                fcntl.flock(whole, fcntl.LOCK_EX)
                if not self._make_room(identity, size):
                    return False
                os.truncate(lock, 0)
                os.pwrite(lock, str(size).encode(), 0)
                return True
        except OSError as error:
            raise _unusable(self.folder, error) from error

    def _make_room(self, identity: str, size: int) -> bool:
        units = []
        for file in self.folder.glob("*.lock"):
            if file.stem not in ("", identity) and file.name != ".lock":
                with suppress(OSError, ValueError):
                    units.append((file.stat().st_mtime_ns, file.stem, int(file.read_text() or "0")))
        taken = sum(unit[2] for unit in units)
        for _, other, other_size in sorted(units):
            if taken + size <= self.limit_bytes:
                break
            with self._locked(other, exclusive=True) as lock:
                if lock is not None:  # nobody reads it, and nobody is making it
                    for name in (other, f"{other}.tmp"):
                        shutil.rmtree(self.folder / name, ignore_errors=True)
                    (self.folder / f"{other}.lock").unlink(missing_ok=True)
                    taken -= other_size
        return taken + size <= self.limit_bytes

    @contextmanager
    def _locked(self, identity: str, *, exclusive: bool) -> Iterator[int | None]:
        """Lock a unit: shared, waiting for who makes it; or exclusively, without waiting (None if others hold it)."""
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
            try:
                yield lock if _is_file(lock, file) else None
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a process forked meanwhile shares the lock: closing is not enough
        finally:
            os.close(lock)


def _is_file(lock: int, file: Path) -> bool:
    """Whether a lock is on the file that is there now: it may have been removed with its unit before we had it."""
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _clear_scratch(root: Path, process: int) -> None:
    """Remove what killed processes left, before the first scratch folder of this process."""
    atomic.remove_leftovers(root, "scratch")


def _unusable(folder: Path, error: OSError) -> StorageError:
    reason = f"{error.strerror or error}"
    more = f", or a smaller {SIZE_VARIABLE}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return StorageError(f"{folder}: cannot be used: {reason}: set {FOLDER_VARIABLE} to another folder{more}")
