"""The sequence tables of a cache that has too many to open at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import overload

import pyarrow as pa

from teacher_cache.format.sequences import SequenceRows

_MOST_OPEN = 4096  # a process may map 65,530 files on Linux


class LazyRows(Sequence[SequenceRows]):
    """The rows of each shard, opened on access; the last few thousand stay open. Safe in threads."""

    def __init__(self, table: Callable[[int], pa.RecordBatch], shards: int) -> None:
        self._table, self._shards = table, shards
        self._open: OrderedDict[int, SequenceRows] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._shards

    @overload
    def __getitem__(self, shard: int) -> SequenceRows: ...
    @overload
    def __getitem__(self, shard: slice) -> Sequence[SequenceRows]: ...
    def __getitem__(self, shard: int | slice) -> SequenceRows | Sequence[SequenceRows]:
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(self._shards))]
        if not 0 <= shard < self._shards:
            raise IndexError(shard)
        with self._lock:
            if shard not in self._open:
                self._open[shard] = SequenceRows(self._table(shard))
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard]
