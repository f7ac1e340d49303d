"""Write files and folders so that none is ever seen half-written under its final name.

Until complete, each is called `.NAME.HOST-PID.tmp`, which distinguishes leftovers of killed processes from the work of
running ones, on this machine and on others that share the disk.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from llavamod_offline.errors import StorageError


def process_space() -> str:
    """What tells apart machines and containers of one host name, whose process numbers may coincide.

    The machine's own id, the same after a restart, and the container's; either is empty if the system has none.
    """
    machine, container = "", ""
    with suppress(OSError):
        machine = Path("/etc/machine-id").read_text("utf-8", errors="replace").strip()[:12]
    with suppress(OSError):
        container = str(Path("/proc/self/ns/pid").stat().st_ino)
    return re.sub(r"[^A-Za-z0-9_]+", "_", f"{machine}_{container}")


_HOST = (re.sub(r"[^A-Za-z0-9_]+", "_", platform.node()) or "here") + f"_{process_space()}"
# We cannot see whether another machine's process is running; one that writes changes something within this time.
_FOREIGN_SECONDS = 3600.0
_FLUSHES = 16
_CLAIM_SECONDS = 30.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself.

    In parallel: each flush waits for the disk, and one after another they would take longer than the writing.
    """
    folders = [Path(root) for root, _, _ in os.walk(folder)]
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    with ThreadPoolExecutor(_FLUSHES, thread_name_prefix="flush") as pool:
        for paths in (files, folders):
            for done in [pool.submit(fsync_path, path) for path in paths]:
                done.result()


def aside_path(target: Path) -> Path:
    """The temporary path at which this process writes `target`."""
    return target.with_name(f".{target.name}.{_HOST}-{os.getpid()}.tmp")


def write_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically: aside, fsync, rename, fsync of the folder."""
    aside = aside_path(path)
    try:
        _write_aside(aside, content)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def create_file(path: Path, content: bytes | str) -> bool:
    """Write a new file atomically; return False, and change nothing, if `path` exists.

    Exactly one of several concurrent processes succeeds, even on file systems without hard links; opening `path` itself
    exclusively would let the others read a half-written file.
    """
    aside = aside_path(path)
    try:
        _write_aside(aside, content)
        try:
            os.link(aside, path)
        except FileExistsError:
            if aside.stat().st_nlink == 1:  # else it is ours, and a network file system lost the reply
                return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with _claimed(path) as mine:
                if not mine:
                    return False
                aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)
    return True


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Hold the exclusive right to create `path`; yield whether it is still missing.

    The right is a file `.NAME.claim` that exists only for the duration of a rename.
    Errors: `StorageError` if another process's claim stays, because that process was killed in between.
    """
    claim = path.with_name(f".{path.name}.claim")
    deadline = time.monotonic() + _CLAIM_SECONDS
    while True:
        try:
            stream = claim.open("x")
            break
        except FileExistsError:
            if path.exists():
                yield False
                return
            if time.monotonic() >= deadline:
                owner = claim.read_text(errors="replace") if claim.exists() else ""
                raise StorageError(
                    f"process {owner or '?'} holds {claim}: remove that file if the process has ended"
                ) from None
            time.sleep(_CLAIM_SECONDS / 1000)
    try:
        with stream:
            stream.write(f"{_HOST}-{os.getpid()}")
        yield not path.exists()
    finally:
        claim.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success flush it and rename it to `target`, on failure remove it.

    `target` must not exist. A killed process leaves only the temporary folder, which `remove_leftovers` clears.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_path(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        fsync_tree(aside)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_path(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: rename it to a temporary name, then delete it.

    Not the name under which this process may be writing its successor.
    """
    aside = aside_path(folder.with_name(f"{folder.name}.old"))
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    fsync_path(folder.parent)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path, name: str) -> list[Path]:
    """Remove what killed writers of `folder/name` left behind, and return the removed paths.

    Keeps what belongs to a running process of this machine, and what another machine or container changed within the
    last hour, by the clock of the file system.
    """
    removed: list[Path] = []
    now: float | None = None
    for aside in sorted(folder.glob(f".{name}.*.tmp")):
        host, _, process = aside.name.split(".")[-2].rpartition("-")
        if host not in ("", _HOST):
            now = _time_there(folder) if now is None else now
            if now - _last_change(aside) < _FOREIGN_SECONDS:
                continue
        elif process.isdigit() and int(process) != os.getpid() and Path(f"/proc/{process}").exists():
            continue
        doomed = aside_path(folder / aside.name[1:].rsplit(".", 2)[0])
        if doomed != aside:  # renamed first: its writer may complete it at this moment
            _remove(doomed)
            try:
                aside.rename(doomed)
            except FileNotFoundError:
                continue
        _remove(doomed)
        removed.append(aside)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
    else:
        path.unlink(missing_ok=True)


def _time_there(folder: Path) -> float:
    """The current time by the clock that dates a folder's files: another machine's, on a network file system."""
    probe = aside_path(folder / "clock")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime
    except OSError:
        return 0.0  # nothing counts as old
    finally:
        probe.unlink(missing_ok=True)


def _write_aside(aside: Path, content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else content
    with aside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _last_change(path: Path) -> float:
    """When `path` or anything below it last changed; now, if it vanishes meanwhile."""
    try:
        return max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
    except OSError:
        return time.time()
