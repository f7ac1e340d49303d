"""Which shard a worker takes next: first those that nobody has begun, then those that others gave up or died on."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from teacher_cache.format.manifest import SHARDS_NAME
from teacher_cache.work.claims import Claims, ShardHistory, read_endings
from teacher_cache.work.heartbeat import Watch, all_workers
from teacher_cache.write.store import CacheStore, committed_shards

_LOOKS_SHARE = 0.05  # at most this share of the time goes into looking for what others have begun

Left = Literal["nothing", "waiting", "failed"]


class ShardQueue:
    """The shards of a cache as one of several workers takes them.

    A shard that has failed `attempts` times is given up. One that a worker failed is left to others first; it retries
    it once all live workers have failed it.
    """

    def __init__(
        self,
        store: CacheStore,
        names: Sequence[str],
        claims: Claims,
        watch: Watch,
        worker: str,
        *,
        attempts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._claims, self._watch = store, claims, watch
        self._worker, self._attempts, self._clock = worker, attempts, clock
        # Workers begin at different places, so that they seldom try to claim the same shard.
        first = zlib.crc32(worker.encode()) % max(len(names), 1)
        self._names = [*names[first:], *names[:first]]
        self._fresh = deque(self._names)
        self._look_after = 0.0
        self.left: Left = "waiting"
        self.failed: dict[str, ShardHistory] = {}

    def take(self) -> Iterator[str]:
        """Claim and yield shards, one at a time, while any is free; then `left` says what is left."""
        while (name := self._next_fresh() or self._next_other()) is not None:
            yield name

    def _next_fresh(self) -> str | None:
        """Claim a shard that nobody has begun."""
        if self._fresh and self._clock() >= self._look_after:
            began = self._clock()
            begun = {*self._claims.look(), *self._store.folder.names(SHARDS_NAME)}
            self._fresh = deque(name for name in self._fresh if name not in begun)
            self._look_after = self._clock() + (self._clock() - began) / _LOOKS_SHARE
        while self._fresh:
            name = self._fresh.popleft()
            if self._claimed(name, 0):
                return name
        return None

    def _next_other(self) -> str | None:
        """Claim a shard that others have given up or died on; also finds out what is left."""
        missing = set(self._store.missing())
        there = self._claims.look()
        histories = {name: there.get(name, ShardHistory()) for name in self._names if name in missing}
        read_endings(self._store.folder, {name: history for name, history in histories.items() if history.given_up})
        holders = {name: self._claims.worker_of(name, item.latest) for name, item in histories.items() if item.is_held}
        self._watch.look({worker for worker in holders.values() if worker not in (None, self._worker)})
        free, self.failed = [], {}
        for name, history in histories.items():
            worker = holders.get(name)
            if worker == self._worker and name not in self._claims.held:
                self._claims.adopt(name, history.latest)
                return name
            dead = worker not in (None, self._worker) and self._watch.is_silent(str(worker))
            if history.is_held and not dead:
                continue
            attempts = history.attempts(dead=dead)
            if attempts >= self._attempts:
                self.failed[name] = history
            else:
                free.append((attempts, name))
        self.left = "nothing" if not missing else "failed" if len(self.failed) == len(missing) else "waiting"
        for _, name in sorted(free, key=lambda item: item[0]):
            if self._may_retry(histories[name]) and self._claimed(name, histories[name].latest):
                return name
        return None

    def _may_retry(self, history: ShardHistory) -> bool:
        """Whether this worker has not failed a shard, or every other live worker has failed it too."""
        failed_by = {ending.worker for ending in history.failures}
        if self._worker not in failed_by:
            return True
        others = set(all_workers(self._store.folder)) - failed_by - {self._worker}
        self._watch.look(others)
        return all(self._watch.is_silent(worker) for worker in others)

    def _claimed(self, name: str, after: int) -> bool:
        """Claim a shard; False if another worker was faster, or has committed it."""
        if not self._claims.take(name, after):
            return False
        if committed_shards(self._store.folder, [name]):  # since we looked
            self._claims.clear(name)
            return False
        return True
