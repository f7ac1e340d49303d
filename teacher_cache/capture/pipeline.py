"""Capturing shards one after another: while the teacher runs on one, the next is read and the previous one is written.

Two threads read and write: they wait for the disk or run NumPy, Blosc and tokenizers, which release the GIL. Processes
were no faster on two busy cores, and threads stop with the run.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from llavamod_offline.grace import Grace
from teacher_cache.capture.shard import PreparedRows, Progress, capture_prepared, prepare_rows
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import SequenceRecord

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ShardCounts:
    """The outcome of a shard: its samples, captured sequences and positions, and what was rejected.

    `seconds`: the teacher's time that it took, excluding the last write; `waited`: the part spent waiting, by cause.
    """

    name: str
    samples: int
    sequences: int
    positions: int
    rejected: tuple[Rejection, ...]
    seconds: float = 0.0
    waited: Mapping[str, float] = field(default_factory=dict)


class ShardSink(Protocol):
    """What captured shards are committed to: a `CacheStore`, or a claim on one shard of it."""

    def commit(
        self, name: str, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], codec: Codec
    ) -> None:
        """See `CacheStore.commit`."""
        ...


def capture_shards(
    setup: CaptureSetup,
    engine: CaptureEngine,
    store: ShardSink,
    names: Iterable[str],
    progress: Progress,
    *,
    grace: Grace | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> Generator[ShardCounts]:
    """Capture shards and commit them in the background; yields each once captured, and ends once all are written.

    At most one shard waits to be written, and one to be captured; `names` are consumed as needed. Errors of the teacher
    and of reading are raised at once, those of writing (`CacheError`, `StorageError`) during the next shard; captured
    shards are still written. With `failed`, errors of reading and of the teacher are passed to it, with the shard's
    name, and the next shard follows. Raises `Stopped` once a shard is written, if `grace` has noted a signal.
    """
    grace = grace or Grace()
    queue = iter(names)
    writing: deque[Future[None]] = deque()
    began, waited = time.monotonic(), setup.waits.seconds.copy()
    unwritten: list[Future[None]] = []  # the write being awaited: its error, not the current shard's, ends the capture

    def read_next() -> tuple[str, Future[PreparedRows]] | None:
        name = next(queue, None)
        return None if name is None else (name, reader.submit(prepare_rows, setup, setup.samples.rows_of(name)))

    def watched(samples: int, positions: int) -> None:
        grace.advance(samples)
        if writing and writing[0].done():
            write_all()
        progress(samples, positions)

    def captured_shard(name: str, prepared: PreparedRows) -> ShardCounts:
        grace.begin(f"shard '{name}'", len(prepared.rows))
        captured, rejected = capture_prepared(setup, engine, prepared, watched)
        grace.end()
        with setup.waits.waiting("writing"):
            write_all()
        writing.append(writer.submit(write, name, captured, rejected))
        positions = sum(len(item.records) for item in captured)
        return ShardCounts(name, len(prepared.rows), len(captured), positions, tuple(rejected), *spent())

    def spent() -> tuple[float, Mapping[str, float]]:
        nonlocal began, waited
        now, waits = time.monotonic(), setup.waits
        found = now - began, waits.since(waited)
        began, waited = now, waits.seconds.copy()
        return found

    def read() -> PreparedRows:
        with setup.waits.waiting("reading"):
            return reading.result()

    def write(name: str, captured: list[SequenceRecord], rejected: list[Rejection]) -> None:
        began = time.monotonic()
        store.commit(name, captured, rejected, setup.codec)
        grace.wrote(time.monotonic() - began)

    def attempt(name: str, action: Callable[[], _Result]) -> _Result | None:
        try:
            return action()
        except Exception as error:
            if failed is None or unwritten:
                raise
            failed(name, error)
            return None

    def write_all() -> None:
        while writing:
            unwritten.append(writing[0])
            writing.popleft().result()
            unwritten.clear()

    with ExitStack() as stack:
        reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="read"))
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        following = read_next()
        while following is not None:
            name, reading = following
            prepared = attempt(name, read)
            following = read_next()
            done = attempt(name, functools.partial(captured_shard, name, prepared)) if prepared else None
            if done:
                yield done
            if grace.noted:
                break
        write_all()
    grace.check()
