"""Capturing shards one after another: while the teacher runs on one, the next is read and the last one written.

Two threads read and write: they wait for the disk or run NumPy, Blosc and tokenizers, which release the GIL. Processes
were no faster on two busy cores, and threads stop with the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from teacher_cache.capture.shard import PreparedRows, Progress, capture_prepared, prepare_rows
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.format.rejection import Rejection
from teacher_cache.write.store import CacheStore


@dataclass(frozen=True)
class ShardCounts:
    """The outcome of a shard: its samples, captured sequences and positions, and what was rejected."""

    name: str
    samples: int
    sequences: int
    positions: int
    rejected: tuple[Rejection, ...]


def capture_shards(
    setup: CaptureSetup, engine: CaptureEngine, store: CacheStore, names: Sequence[str], progress: Progress
) -> Generator[ShardCounts]:
    """Capture shards and commit them in the background; yields each once captured, and ends once all are written.

    At most one shard waits to be written, and one to be captured. Errors of the teacher and of reading are raised at
    once, those of writing (`CacheError`, `StorageError`) during the next shard; captured shards are still written.
    """
    writing: deque[Future[None]] = deque()

    def watched(samples: int, positions: int) -> None:
        if writing and writing[0].done():
            writing.popleft().result()
        progress(samples, positions)

    def captured_shard(name: str, prepared: PreparedRows) -> ShardCounts:
        captured, rejected = capture_prepared(setup, engine, prepared, watched)
        while writing:
            writing.popleft().result()
        writing.append(writer.submit(store.commit, name, captured, rejected, setup.codec))
        positions = sum(len(item.records) for item in captured)
        return ShardCounts(name, prepared.samples, len(captured), positions, tuple(rejected))

    with ExitStack() as stack:
        reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="read"))
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        following = reader.submit(prepare_rows, setup, setup.samples.rows_of(names[0])) if names else None
        for number, name in enumerate(names):
            assert following is not None
            prepared = following.result()
            if number + 1 < len(names):
                following = reader.submit(prepare_rows, setup, setup.samples.rows_of(names[number + 1]))
            yield captured_shard(name, prepared)
        while writing:
            writing.popleft().result()
