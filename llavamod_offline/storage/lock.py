"""One writer per output: a lock file that says who is writing it.

    OUTPUT/.lock    JSON: host, process, when it and the lock began, command, cluster job

A file rather than a kernel lock, so that another host, a bucket's user or a person can read it. A killed process leaves
its lock behind. On the same host, the next command sees that the process is gone (its start time is compared, because
process numbers are reused) and takes the lock over; it does the same, on any host, if SLURM requeued the job. Otherwise
a person decides: the message says what was seen last.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from llavamod_offline.errors import ConfigError, StorageError
from llavamod_offline.plural import counted
from llavamod_offline.signals import leaving
from llavamod_offline.storage.atomic import process_space, remove_leftovers
from llavamod_offline.storage.folders import LocalFolder, open_folder
from llavamod_offline.storage.remote import RemoteFolder

LOCK_NAME = ".lock"
_SLICE = re.compile(r"-\d+-of-\d+$")
_COMMAND_SHOWN = 120
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock. `started`: its start in the kernel's clock ticks; `job`, `restart`: of SLURM.

    `space`: tells containers of one host name apart. `token`: unique to each lock.
    """

    host: str
    process: int
    started: str
    since: str
    command: str
    job: str = ""
    restart: str = ""
    space: str = ""
    token: str = ""

    @classmethod
    def this_process(cls) -> LockOwner:
        """Describe this process."""
        return cls(
            host=platform.node(),
            process=os.getpid(),
            started=_process_start(os.getpid()) or "",
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
            space=process_space(),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, content: bytes) -> LockOwner | None:
        """Read a lock file; None if it is damaged."""
        try:
            return of_any_version(cls, json.loads(content))
        except (ValueError, TypeError):
            return None

    @property
    def is_local(self) -> bool:
        """Whether it ran on this host, and not in another container."""
        return self.host == platform.node() and self.space in ("", process_space())

    @property
    def is_gone(self) -> bool:
        """Whether it is certain that the process has ended."""
        if (
            self.job
            and self.job == os.environ.get("SLURM_JOB_ID")
            and self.restart != os.environ.get("SLURM_RESTART_COUNT", "0")
        ):
            return True
        return self.is_local and _process_start(self.process) != self.started

    @property
    def shown(self) -> str:
        """The command, for an error message."""
        return self.command if len(self.command) <= _COMMAND_SHOWN else f"{self.command[:_COMMAND_SHOWN]}…"


def of_any_version(kind: type[_Kind], told: Mapping[str, Any]) -> _Kind:
    """Make a dataclass from a file's content, ignoring further fields that another version may have written."""
    known: Any = kind
    return kind(**{item.name: told[item.name] for item in fields(known) if item.name in told})


@contextmanager
def locked(where: str | Path, name: str = LOCK_NAME, *, output: str | Path | None = None) -> Iterator[None]:
    """Hold the lock file `name` in the folder or URL `where`, which is created, and removed if it stays empty.

    `output`: what the lock is for, if not `where`. It is released at the end, by this process alone and not by forks.
    Locks of slices, named `NAME-i-of-n`, exclude `NAME` but not each other.
    Errors: `ConfigError` if another process holds the lock, or the folder cannot be written; `StorageError`.
    """
    folder = open_folder(where)
    shown = folder.where if output is None else str(output)
    mine = LockOwner.this_process()
    content = (json.dumps(asdict(mine), indent=1) + "\n").encode()  # ASCII: a command line may hold any bytes
    made = _missing_folders(folder.path) if isinstance(folder, LocalFolder) else []
    try:
        _take(folder, name, content, shown)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(
            f"output: {shown} cannot be written ({error.strerror or error}): choose another output"
        ) from error

    def release() -> None:
        if os.getpid() == mine.process:
            with suppress(OSError, StorageError):  # it was removed by hand, or the bucket cannot be reached
                if folder.read(name) == content:
                    folder.remove_files([name])
            _remove_empty(made)

    try:
        with leaving(release):
            _check_slices(folder, name, shown)
            yield
    finally:
        release()


def locked_beside(output: str | Path) -> AbstractContextManager[None]:
    """Hold the lock `.NAME.lock` beside a local output that must not exist until it is complete."""
    path = Path(output).absolute()
    return locked(path.parent, f".{path.name}.lock", output=output)


def check_unlocked(where: str | Path) -> None:
    """Refuse an output that any process is writing. Errors: `ConfigError` naming it."""
    folder = open_folder(where)
    _check_free(folder, sorted(found for found in folder.names() if found.startswith(LOCK_NAME)), folder.where)


def _check_slices(folder: LocalFolder | RemoteFolder, name: str, output: str) -> None:
    """Refuse a slice beside a command that writes everything, and the reverse; each takes its own lock first."""
    whole = _SLICE.sub("", name)
    beside = [whole] if whole != name else [other for other in folder.names() if _SLICE.sub("", other) == name != other]
    _check_free(folder, sorted(beside), output)


def _check_free(folder: LocalFolder | RemoteFolder, names: Sequence[str], output: str) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            owner = LockOwner.read(folder.read(name))
            if owner is None or not owner.is_gone:
                raise _in_use(folder, name, output, owner)


def _take(folder: LocalFolder | RemoteFolder, name: str, content: bytes, output: str) -> None:
    """Create the lock file, taking over that of a process that is gone. Errors: `ConfigError`, `OSError`."""
    if isinstance(folder, LocalFolder):
        folder.path.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder):
        if isinstance(folder, LocalFolder):
            remove_leftovers(folder.path, name)  # of processes that were killed while taking or releasing it
        while not folder.create(name, content):
            try:
                owner = LockOwner.read(folder.read(name))
            except FileNotFoundError:
                continue  # released meanwhile
            if owner is None or not owner.is_gone:
                raise _in_use(folder, name, output, owner)
            folder.remove_files([name])


@contextmanager
def _one_at_a_time(folder: LocalFolder | RemoteFolder) -> Iterator[None]:
    """Let this host's processes take turns, because two might take over the same lock of a third that is gone.

    File systems without such locks do without, as buckets do.
    """
    if not isinstance(folder, LocalFolder):
        yield
        return
    descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _in_use(folder: LocalFolder | RemoteFolder, name: str, output: str, owner: LockOwner | None) -> ConfigError:
    lock = f"{folder.where}/{name}"
    if owner is None:
        return ConfigError(
            f"output: {output} is locked by {lock}, which is damaged: if nothing writes there, delete it"
        )
    if owner.is_local:
        return ConfigError(
            f"output: {output} is in use by process {owner.process}, since {owner.since}: `{owner.shown}`: wait for "
            "it, stop it, or choose another output"
        )
    seen = _last_change(folder.path) if isinstance(folder, LocalFolder) else None
    last = "" if seen is None else f"; its files last changed {_duration(time.time() - seen)} ago"
    return ConfigError(
        f"output: {output} is in use by process {owner.process} on host {owner.host}, since {owner.since}: "
        f"`{owner.shown}`{last}: wait for it, or, if it has ended, delete {lock}"
    )


def _process_start(process: int) -> str | None:
    """The start of a process of this host, "" where the system does not tell; None if it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # a zombie has ended
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    return ""


def _last_change(folder: Path) -> float | None:
    """When a file in a folder, or in one of its folders, last changed."""
    times = []
    for pattern in ("*", "*/*", "*/*/*"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(times, default=None)


def _duration(seconds: float) -> str:
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return counted(int(seconds // size), unit)
    return f"{max(0, int(seconds))} s"


def _missing_folders(path: Path) -> list[Path]:
    """The folders that making `path` would create, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            if any(folder.iterdir()):
                break
            folder.rmdir()
