"""Capturing shards one after another: while the teacher runs on one, the next is read and the last one written.

Threads do both. What they do is waiting for the disk or in NumPy, Blosc and tokenizers, which let other threads run; no
gain of a process over a thread could be measured on two busy cores, and a thread dies with its run.
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
    """What became of a shard: its samples, the sequences and positions that were captured, and those that were not."""

    name: str
    samples: int
    sequences: int
    positions: int
    rejected: tuple[Rejection, ...]


def capture_shards(
    setup: CaptureSetup, engine: CaptureEngine, store: CacheStore, names: Sequence[str], progress: Progress
) -> Generator[ShardCounts]:
    """Capture shards and commit them in the background; yields each once it is captured, and ends once all are written.

    At most one shard waits to be written, and one to be captured. Errors: those of the teacher and of reading at once,
    those of writing (`CacheError`, `StorageError`) while the next shard is being captured. What was captured is then
    still written, if it can be.
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
