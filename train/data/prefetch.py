"""Shards behind a URL are copied before they are needed: those of the window in use, then of the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llavamod_offline.background import BackgroundIterator, Job
from llavamod_offline.data.sampler import BatchSchedule, Order
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.disk_cache import SIZE_VARIABLE, DiskCache

if TYPE_CHECKING:
    from teacher_cache.read.reader import TeacherCache

Batch = TypeVar("Batch")


class Prefetch:
    """Copies what an order will read, a window's worth and as much of the next one as the staging folder holds.

    A shard of the set brings the cache's shard of that name. Errors: `ConfigError` if there is no room for a window.
    """

    def __init__(self, order: Order, samples: SampleSet, cache: TeacherCache | None) -> None:
        self._order = order
        self._samples = samples
        self._cache = cache if cache is not None and cache.is_remote else None
        cached = {} if self._cache is None else self._cache.shard_bytes
        self._cached = [name if name in cached else None for name in samples.shard_names]
        self._sizes = [
            (shard.size if samples.tars.is_remote(ordinal) else 0) + cached.get(shard.name, 0)
            for ordinal, shard in enumerate(samples.shards)
        ]
        self._check_room()

    @property
    def is_needed(self) -> bool:
        """Whether anything lies behind a URL."""
        return any(self._sizes)

    def around(self, batches: Iterable[Batch], schedule: BatchSchedule) -> Iterator[Batch]:
        """Pass a schedule's micro-batches on, and copy ahead of them meanwhile."""
        if not self.is_needed:
            yield from batches
            return
        size = self._order.batch_size
        with BackgroundIterator() as ahead:
            submitted: set[tuple[int, int]] = set()  # where windows begin, and their shards
            self._submit(ahead, schedule.start * size, schedule.stop * size, submitted)
            for number, batch in enumerate(batches):
                if number % schedule.micro_batches == 0:
                    place = (schedule.start + number // schedule.micro_batches) * size
                    self._submit(ahead, place, schedule.stop * size, submitted)
                yield batch

    def _submit(self, ahead: BackgroundIterator, place: int, end: int, submitted: set[tuple[int, int]]) -> None:
        """Have the shards of the window at a place copied, and those of the next one for which there is room beside."""
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

    def _check_room(self) -> None:
        if not self.is_needed:
            return
        count = self._order.window or len(self._sizes)
        needed = int(np.sort(self._sizes)[-count:].sum())
        if needed > self._staging.limit_bytes:
            raise ConfigError(
                f"data.window: {count} shards and their records are up to {needed / 1e9:.1f} GB, and "
                f"{self._staging.folder} may hold {self._staging.limit_bytes / 1e9:.1f}: set {SIZE_VARIABLE} to "
                "more, or data.window to less"
            )
