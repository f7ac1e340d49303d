"""One worker of a capture on Ray: an engine in its own process that captures whole shards."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llavamod_offline.errors import LlavaModError
from teacher_cache.capture.pipeline import ShardCounts
from teacher_cache.capture.shard import capture_prepared, prepare_rows
from teacher_cache.capture_setup import SetupValues, prepare_capture
from teacher_cache.write.store import CacheStore

REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerReport:
    """A worker's progress on each of its shards, and what it has logged since the last report."""

    samples: dict[str, int]
    positions: dict[str, int]
    lines: list[str]


class CaptureWorker:
    """Captures shards of the set that `values` name and commits them to the store itself.

    Its methods run in threads: one shard may be read or written while the teacher runs on another. A `LlavaModError` is
    returned, not raised, since Ray would wrap it.
    """

    def __init__(self, values: SetupValues, output: str, allow: Sequence[str]) -> None:
        self._values, self._output, self._allow = values, output, allow
        self._reading = threading.Lock()  # a tokenizer must not be set up by two threads at once
        self._teacher = threading.Lock()
        self._samples: dict[str, int] = {}
        self._positions: dict[str, int] = {}
        self._lines: list[str] = []

    def open(self) -> LlavaModError | None:
        """Load the teacher, and check that set and fingerprint match the driver's."""
        if hasattr(self, "_engine"):  # only the connection to this worker was lost
            return None
        log_into(self._lines)
        try:
            self._setup = prepare_capture(**self._values)
            names = self._setup.samples.shard_names
            self._store = CacheStore.open(self._output, self._setup.fingerprint, names, allow=self._allow)
            self._engine = self._setup.load()
            self._idle_since = time.monotonic()
        except LlavaModError as error:
            return error
        return None

    def capture(self, name: str) -> ShardCounts | LlavaModError:
        """Capture one shard and commit it."""
        setup = self._setup
        self._samples[name] = self._positions[name] = 0
        try:
            with self._reading:
                prepared = prepare_rows(setup, setup.samples.rows_of(name))
            with self._teacher:
                began, waited = self._idle_since, setup.waits.seconds.copy()
                setup.waits.add("reading", time.monotonic() - began)
                captured, rejected = capture_prepared(
                    setup, self._engine, prepared, lambda samples, positions: self._count(name, samples, positions)
                )
                self._idle_since = time.monotonic()
                spent = self._idle_since - began, setup.waits.since(waited)
            self._store.commit(name, captured, rejected, setup.codec)
        except LlavaModError as error:
            return error
        finally:
            del self._samples[name], self._positions[name]
        positions = sum(len(item.records) for item in captured)
        return ShardCounts(name, len(prepared.rows), len(captured), positions, tuple(rejected), *spent)

    def report(self) -> WorkerReport:
        """Wait briefly, then report progress and log lines."""
        time.sleep(REPORT_SECONDS)
        lines, self._lines[:] = self._lines[:], []
        return WorkerReport(dict(self._samples), dict(self._positions), lines)

    def _count(self, name: str, samples: int, positions: int) -> None:
        self._samples[name] += samples
        self._positions[name] += positions


def log_into(lines: list[str]) -> None:
    """Keep this process's warnings in `lines`."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    for package in ("llavamod_offline", "teacher_cache"):
        logging.getLogger(package).addHandler(handler)
