"""Copy remote shards to the disk cache before they are read: the current window's, then the next one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llavamod_offline.background import BackgroundIterator, Job
from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.disk_cache import SIZE_VARIABLE, DiskCache

if TYPE_CHECKING:
    from teacher_cache.read.several import Teachers

Batch = TypeVar("Batch")


class Prefetch:
    """Copies the shards an order will read: a window, and as much of the next one as the disk cache holds.

    With a set's shard it copies the teacher cache's shard of that name.
    """

    def __init__(self, order: Order, samples: SampleSet, cache: Teachers | None) -> None:
        self._order = order
        self._samples = samples
        self._cache = cache if cache is not None and cache.is_remote else None
        cached = {} if self._cache is None else self._cache.shard_bytes
        self._cached = [name if name in cached else None for name in samples.shard_names]
        self._sizes = [
            (shard.size if samples.tars.is_remote(ordinal) else 0) + cached.get(shard.name, 0)
            for ordinal, shard in enumerate(samples.shards)
        ]

    @property
    def is_needed(self) -> bool:
        """Whether any shard is remote."""
        return any(self._sizes)

    def around(self, batches: Iterable[Batch], schedule: BatchSchedule) -> Iterator[Batch]:
        """Yield a schedule's micro-batches, copying ahead of them in the background."""
        if not self.is_needed:
            yield from batches
            return
        with BackgroundIterator() as ahead:
            submitted: set[tuple[int, int]] = set()  # (start of a window, shard)
            end = self._order.position(schedule.stop)
            self._submit(ahead, self._order.position(schedule.start), end, submitted)
            for number, batch in enumerate(batches):
                if number % schedule.micro_batches == 0:
                    step = schedule.start + number // schedule.micro_batches
                    self._submit(ahead, self._order.position(step), end, submitted)
                yield batch

    def _submit(self, ahead: BackgroundIterator, place: int, end: int, submitted: set[tuple[int, int]]) -> None:
        """Submit copies of the window's shards at a place, and of those of the next window that also fit."""
        window = self._order.window_at(place)
        room = self._staging.limit_bytes - sum(self._sizes[shard] for shard in window.shards.tolist())
        wanted = [(window.start, shard) for shard in window.shards.tolist()]
        if window.stop < end:
            following = self._order.window_at(window.stop)
            for shard in following.shards.tolist():
                room -= 0 if shard in window.shards else self._sizes[shard]
                if room < 0:
                    break
                wanted.append((following.start, shard))
        for item in wanted:
            if item not in submitted:
                submitted.add(item)
                ahead.submit(self._job(item[1]))

    def _job(self, shard: int) -> Job:
        def copy() -> None:
            if self._samples.tars.is_remote(shard):
                with self._samples.tars.hold(shard):
                    pass
            name = self._cached[shard]
            if self._cache is not None and name is not None:
                self._cache.stage(name)

        return copy

    @property
    def _staging(self) -> DiskCache:
        return self._samples.tars.staging

    def check_room(self) -> None:
        """Check that a window fits into the disk cache. Errors: `ConfigError`."""
        if not self.is_needed:
            return
        count = self._order.window or len(self._sizes)
        needed = int(np.sort(self._sizes)[-count:].sum())
        if needed > self._staging.limit_bytes:
            raise ConfigError(
                f"data.window: {count} shards and their records take up to {needed / 1e9:.1f} GB, but "
                f"{self._staging.folder} is limited to {self._staging.limit_bytes / 1e9:.1f}: raise {SIZE_VARIABLE}, "
                "or lower data.window"
            )
