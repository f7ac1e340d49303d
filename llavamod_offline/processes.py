"""Worker processes beside this one: they leave signals to it, and end when it ends, for whatever reason."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from llavamod_offline.signals import SIGNALS, starting_processes

_Result = TypeVar("_Result")


def available_cores() -> int:
    """The number of processor cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessPool:
    """Up to `workers` spawned processes, each prepared by `begin`, which must be picklable.

    Once one of them has died, the others end, and calls raise `BrokenProcessPool`.
    """

    def __init__(self, workers: int, begin: Callable[[], object] | None = None) -> None:
        self._executor = ProcessPoolExecutor(workers, mp_context=_Context(), initializer=partial(_start, begin))

    def submit(self, function: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
        """Call a function in one of the processes. Errors: `BrokenProcessPool`."""
        with starting_processes(immune_to=SIGNALS):  # losing one while another starts would print a traceback
            return self._executor.submit(function, *arguments)

    def close(self) -> None:
        """End all processes after the work they have in hand, and wait for that."""
        self._executor.shutdown(cancel_futures=True)


class _Process(SpawnProcess):
    """A process that leaves signals to its parent; `terminate` sends SIGKILL, as when a pool has lost another."""

    def terminate(self) -> None:
        """End it at once."""
        self.kill()


class _Context(SpawnContext):
    """Starts such processes."""

    Process = _Process


def _start(begin: Callable[[], object] | None) -> None:
    """Prepare this process, which exits when its parent ends for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if begin is not None:
        begin()
