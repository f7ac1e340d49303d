"""Workers that share one output: each renews a file that says what it is doing, and others see whether it still does.

    CACHE/.work/workers/WORKER.json    see `WorkerState`

Neither other machines' clocks nor file times are trusted: whoever waits for a worker measures, on its own monotonic
clock, how long the number of renewals has stayed the same.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError, StorageError, first_line
from llavamod_offline.storage.folders import Folder, open_folder
from llavamod_offline.storage.lock import LockOwner, of_any_version

WORK_NAME = ".work"
RENEWALS_PER_LEASE = 12

_WORKERS = f"{WORK_NAME}/workers"
_ENDED = "ended"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerState:
    """What a worker says about itself; counts and seconds are its own, since its start.

    `state`: loading, capturing, waiting or ended. `holds`: the shards that it has claimed. `capturing_seconds`: while
    its teacher ran, which gives its speed; `waited_seconds`: those of them spent waiting. `attempts`: the failures
    after which it gives a shard up. A worker that does not renew for `lease_seconds` counts as dead.
    """

    worker: str
    owner: dict[str, Any]
    lease_seconds: float
    renewals: int = 0
    state: str = "loading"
    seconds: float = 0.0
    capturing_seconds: float = 0.0
    waited_seconds: float = 0.0
    gpus: float = 0.0
    attempts: int = 0
    shards: int = 0
    samples: int = 0
    positions: int = 0
    holds: list[str] = field(default_factory=list)

    @property
    def renew_seconds(self) -> float:
        """The pause between two renewals."""
        return self.lease_seconds / RENEWALS_PER_LEASE

    @property
    def has_ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.state == _ENDED


class Heartbeat:
    """This process as a worker: a context manager that renews its file in a thread, and records there when it ends.

    Errors: `ConfigError` if the lease is too short to be renewed; those of the folder when it begins.
    """

    def __init__(self, folder: Folder, lease_seconds: float) -> None:
        if not 1.0 <= lease_seconds < math.inf:
            raise ConfigError(f"--lease is {lease_seconds:g}: must be at least 1 second, and finite")
        owner = LockOwner.this_process()
        host = re.sub(r"[^A-Za-z0-9_]+", "_", platform.node()) or "here"
        self.worker = f"{host}-{owner.process}-{uuid.uuid4().hex[:8]}"
        self.lease_seconds = lease_seconds
        self._folder = folder
        self._state = WorkerState(self.worker, asdict(owner), lease_seconds)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.tell(state=_ENDED, holds=[])
        try:
            self._write()
        except (OSError, StorageError) as error:
            _LOG.warning("%s: cannot report that this worker has ended: %s", self._folder.where, first_line(error))

    def tell(self, **values: Any) -> None:
        """Change what the next renewal says."""
        with self._lock:
            self._state = replace(self._state, **values)

    def count(self, **more: float) -> None:
        """Add to what the next renewal says."""
        with self._lock:
            self._state = replace(self._state, **{name: getattr(self._state, name) + more[name] for name in more})

    def _write(self) -> None:
        with self._lock:
            seconds = round(time.monotonic() - self._began, 3)
            self._state = replace(self._state, renewals=self._state.renewals + 1, seconds=seconds)
            content = json.dumps(asdict(self._state)) + "\n"
        self._folder.write(f"{_WORKERS}/{self.worker}.json", content.encode())

    def _renew(self) -> None:
        while not self._stop.wait(self._state.renew_seconds):
            try:
                self._write()
            except (OSError, StorageError) as error:
                _LOG.warning("%s: this worker cannot be renewed: %s", self._folder.where, first_line(error))


class Watch:
    """Sees whether other workers are alive, by looking at their files repeatedly."""

    def __init__(self, folder: Folder, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._lease_seconds = lease_seconds  # of a worker whose file is missing
        self._clock = clock
        self._seen: dict[str, WorkerState | None] = {}
        self._looked: dict[str, float] = {}
        self._idle: dict[str, float] = {}

    def look(self, workers: Iterable[str]) -> None:
        """Look at some workers once more; those that have ended are not read again."""
        wanted = [worker for worker in workers if not self._has_ended(worker)]
        for worker, state in zip(wanted, read_workers(self._folder, wanted), strict=True):
            now = self._clock()
            if worker not in self._looked or state != self._seen[worker]:
                self._idle[worker] = 0.0
            else:
                # A pause of our own, as when this machine slept, says nothing about others.
                pause = 2 * self._lease_of(worker) / RENEWALS_PER_LEASE
                self._idle[worker] += min(now - self._looked[worker], pause)
            self._seen[worker], self._looked[worker] = state, now

    def is_silent(self, worker: str) -> bool:
        """Whether a worker has ended, or has not renewed for a whole lease while we looked."""
        return self._has_ended(worker) or self._idle.get(worker, 0.0) >= self._lease_of(worker)

    def _has_ended(self, worker: str) -> bool:
        state = self._seen.get(worker)
        return state is not None and state.has_ended

    def _lease_of(self, worker: str) -> float:
        state = self._seen.get(worker)
        return self._lease_seconds if state is None else state.lease_seconds


def all_workers(folder: Folder) -> list[str]:
    """The names of all workers that an output has ever had."""
    names = folder.names(_WORKERS)
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith("."))


def read_workers(folder: Folder, workers: Iterable[str]) -> list[WorkerState | None]:
    """The states of some workers, None for one whose file is missing or damaged."""
    return [_parse(content) for content in read_present(folder, [f"{_WORKERS}/{worker}.json" for worker in workers])]


def read_present(folder: Folder, names: list[str]) -> list[bytes | None]:
    """The content of each file, None for one that is missing."""
    try:
        return list(folder.read_all(names))
    except FileNotFoundError:  # one of them was removed in between
        return [_read(folder, name) for name in names]


def check_no_workers(where: str | Path, pause: Callable[[float], None] = time.sleep) -> None:
    """Refuse an output that workers are writing; watches for at most a lease whether those on other hosts renew.

    Errors: `ConfigError` naming one that is alive.
    """
    folder = open_folder(where)
    watch = Watch(folder, 0.0)
    first: dict[str, WorkerState] = {}
    names = all_workers(folder)
    while names:
        watch.look(names)
        living = []
        for state in filter(None, read_workers(folder, [name for name in names if not watch.is_silent(name)])):
            owner = LockOwner.read(json.dumps(state.owner).encode()) or LockOwner("?", 0, "", "", "")
            before = first.setdefault(state.worker, state)
            if owner.is_gone:
                continue
            if owner.is_local or state.renewals != before.renewals:
                raise ConfigError(
                    f"output: {folder.where} is in use by a worker, process {owner.process} on host {owner.host}: "
                    f"`{owner.shown}`: wait for it, stop it, or choose another output"
                )
            living.append(state)
        names = [state.worker for state in living]
        if living:
            longest = max(state.lease_seconds for state in living)
            _LOG.info("%s: %d workers have not reported their end: watching for %g s", where, len(living), longest)
            pause(min(state.renew_seconds for state in living))


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> WorkerState | None:
    try:
        return None if content is None else of_any_version(WorkerState, json.loads(content))
    except (ValueError, TypeError):
        return None
