"""Run jobs in the background before their results are needed, on daemon threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from llavamod_offline.errors import LlavaModError

Job = Callable[[], object]
_THREADS = 4
_PATIENCE_SECONDS = 1.0


class BackgroundIterator:
    """Runs jobs in order, a few at once, until it is closed; a context manager.

    A job's error silently stops all jobs: the caller that needs the result repeats the job and reports the error with
    its context. Start it after forking workers: threads do not survive a fork.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]

    def __enter__(self) -> BackgroundIterator:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Start no more jobs; wait only briefly for one that is blocked on the network."""
        self._closed.set()
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)

    def submit(self, job: Job) -> None:
        """Add a job."""
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._closed.is_set():
            try:
                job()
            except LlavaModError:
                self._closed.set()
