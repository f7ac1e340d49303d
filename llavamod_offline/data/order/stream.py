"""The training order as a pure function: the rows of step `s`, for any number of ranks and workers.

Epochs follow one another in one endless stream. Step `s` of batch size `G` takes its elements `s·G … (s+1)·G − 1`. So
each epoch is complete and free of repeats, a batch at an epoch's end is filled from the next epoch, and the state of a
run is one integer, the step.

An epoch consists of *windows*: the shards are shuffled and split into groups of `window`, and the samples of each group
are shuffled together (`window` 0: one window of all shards, a full shuffle). With weights a sample has that many copies
in an epoch; with lengths, the batches of a window hold samples of similar length; with kinds, all batches of a window
but one hold samples of one kind. Everything is defined by 64-bit integer arithmetic.

Shape suffixes: N samples, numbered in set order (so shard by shard); a *place* is such a number; E elements of a
window.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.order.copies import Copies, Weights
from llavamod_offline.data.order.grouping import Rows, by_length, grouped
from llavamod_offline.data.order.hashes import SHARDS, hashes
from llavamod_offline.errors import ConfigError

_T = TypeVar("_T")

_COPY_STEP = 2**40  # between the hashed numbers of a sample's copies, where samples have numbers of their own


@dataclass(frozen=True)
class Window:
    """A stretch of the stream, `start` … `stop` − 1, whose samples lie in `shards`; `number`: from 0 in its epoch."""

    epoch: int
    start: int
    stop: int
    shards: Rows
    number: int = 0


@dataclass(frozen=True)
class Mark:
    """A position in the stream: epoch, number of the window in it, elements before it in the window, and the hash of
    the last of them in hash order (−1: there is none)."""

    epoch: int
    window: int
    inside: int
    last: int


class Order:
    """The endless stream over `n` samples, from which each step takes a batch of `batch_size`.

    `shards_N`: the shard of each sample, non-decreasing. `window`: shards shuffled together, 0: all.
    `lengths_N`: of the samples, in any unit, if batches are to hold similar lengths. `kinds_N`: whether a sample is of
    the first of two kinds, if batches are to hold one kind each.
    With weight w an epoch holds each sample of a source ⌊w⌋ times, and some once more, so that the total is w times
    their number, rounded, and at least 1; which ones changes from epoch to epoch.
    Samples are shuffled by hashes of their numbers, 0 … n − 1 unless `renumber` gives others. If samples are removed or
    added and the others keep their numbers, the others stay in the same order. An `offset` shifts the steps: step `s`
    takes the elements from `s·G + offset` on.
    Errors: `ConfigError` if no samples are left, or a number is out of range.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        batch_size: int,
        shards_N: NDArray[np.integer] | None = None,
        window: int = 0,
        weights: Weights | None = None,
        lengths_N: NDArray[np.integer] | None = None,
        kinds_N: NDArray[np.bool_] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: must be at least 1")
        if window < 0:
            raise ConfigError(f"window {window}: must not be negative")
        self.n, self.seed, self.batch_size, self.window = n, seed, batch_size, window
        self.lengths_N, self.kinds_N = lengths_N, kinds_N
        self.offset = 0
        self._numbers_N: NDArray[np.integer] | None = None
        shards_N = np.zeros(n, np.int64) if shards_N is None else shards_N
        changes = np.ones(n, np.bool_)
        np.not_equal(shards_N[1:], shards_N[:-1], out=changes[1:])
        self._firsts = np.flatnonzero(changes)
        self._shards = shards_N[self._firsts].astype(np.int64)
        self._ends = np.append(self._firsts[1:], n)
        self._copies = None if weights is None else Copies(weights, seed)
        self.per_epoch = n if self._copies is None else self._copies.total
        if self.per_epoch < 1:
            raise ConfigError("no samples: the set is empty, or all are excluded or of weight 0")
        self._layouts: dict[Hashable, _Layout] = {}
        self._shuffled: dict[Hashable, Rows] = {}

    def batch(self, step: int) -> Rows:
        """The places of one step (from 0), over all ranks; by decreasing length if lengths are known."""
        places = self.places(self.position(step), self.position(step + 1))
        if self.lengths_N is not None:
            places = by_length(places, self.lengths_N)
        return places

    def renumber(self, numbers_N: NDArray[np.integer], offset: int = 0) -> None:
        """Give the samples other numbers, and the steps another offset."""
        self._numbers_N, self.offset = numbers_N, offset
        self._layouts, self._shuffled = {}, {}

    @property
    def is_exact(self) -> bool:
        """Whether `find` finds exactly what a mark says."""
        return self.lengths_N is None and self.kinds_N is None and self._copies is None

    @property
    def is_numbered(self) -> bool:
        """Whether the samples have numbers of their own."""
        return self._numbers_N is not None

    def position(self, step: int) -> int:
        """The element of the stream with which a step begins."""
        return step * self.batch_size + self.offset

    def mark(self, position: int) -> Mark:
        """Describe a position so that it can be found again after samples were removed or added."""
        window = self.window_at(position)
        inside = position - window.start
        sorted_E = np.sort(self._entry_hashes(window)[1])
        return Mark(window.epoch, window.number, inside, int(sorted_E[inside - 1]) if inside else -1)

    def find(self, mark: Mark) -> int:
        """The position of a mark: what came before it and still exists comes before it here too.

        Exact if samples kept their numbers and windows; with lengths, kinds or weights only the count before it is.
        """
        layout = self._layout(mark.epoch)
        start = mark.epoch * self.per_epoch
        if mark.window >= len(layout.window_ends):
            return start + self.per_epoch
        first = int(layout.window_ends[mark.window - 1]) if mark.window else 0
        window = self.window_at(start + first)
        if not self.is_exact:
            return min(window.start + mark.inside, window.stop)
        hashes_E = self._entry_hashes(window)[1]
        return window.start + int((hashes_E <= np.uint64(mark.last)).sum()) if mark.inside else window.start

    def places(self, start: int, stop: int) -> Rows:
        """Elements `start … stop − 1` of the endless stream."""
        found = []
        while start < stop:
            window = self.window_at(start)
            found.append(self._window_places(window)[start - window.start : stop - window.start])
            start += len(found[-1])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def window_at(self, place: int) -> Window:
        """The window that holds an element of the stream."""
        epoch, offset = divmod(place, self.per_epoch)
        layout = self._layout(epoch)
        number = int(np.searchsorted(layout.window_ends, offset, side="right"))
        first = int(layout.window_ends[number - 1]) if number else 0
        size = self.window or len(layout.order)
        inside = np.sort(layout.order[number * size : (number + 1) * size])
        start = epoch * self.per_epoch
        return Window(epoch, start + first, start + int(layout.window_ends[number]), inside, number)

    def _layout(self, epoch: int) -> _Layout:
        def make() -> _Layout:
            copies_N = None if self._copies is None else self._copies.of_epoch(epoch)
            if copies_N is None:
                counts = self._ends - self._firsts
            else:
                counts = np.diff(
                    np.concatenate([[0], np.cumsum(copies_N, dtype=np.int64)])[np.append(self._firsts, self.n)]
                )
            there = np.flatnonzero(counts)
            order = there[np.argsort(hashes(self._shards[there], self.seed, epoch, SHARDS))]
            ends = np.cumsum(counts[order])
            size = self.window or len(order)
            last = np.minimum(np.arange(size, len(order) + size, size), len(order)) - 1
            begins = np.concatenate([[0], np.cumsum(counts)])
            return _Layout(self._shards[order], ends[last], begins, copies_N)

        return _kept(self._layouts, epoch, make)

    def _window_places(self, window: Window) -> Rows:
        def make() -> Rows:
            places, hashes_E = self._entry_hashes(window)
            places = places[np.argsort(hashes_E)]
            start = window.start - self.offset
            return grouped(places, self.lengths_N, self.kinds_N, size=self.batch_size, start=start, seed=self.seed)

        return _kept(self._shuffled, (window.epoch, window.start), make)

    def _entry_hashes(self, window: Window) -> tuple[Rows, NDArray[np.uint64]]:
        """The places of a window, shard by shard with their copies, and the hashes that shuffle them."""
        layout = self._layout(window.epoch)
        numbers = np.searchsorted(self._shards, window.shards)
        places = np.concatenate([self._shard_places(layout, number) for number in numbers.tolist()])
        if self._numbers_N is None:
            inputs = np.concatenate([np.arange(layout.begins[n], layout.begins[n + 1]) for n in numbers.tolist()])
        else:
            firsts = np.flatnonzero(np.diff(places, prepend=-1))
            copies = np.arange(len(places)) - np.repeat(firsts, np.diff(np.append(firsts, len(places))))
            inputs = self._numbers_N[places] + copies * _COPY_STEP
        return places, hashes(inputs, self.seed, window.epoch)

    def _shard_places(self, layout: _Layout, number: int) -> Rows:
        first, end = int(self._firsts[number]), int(self._ends[number])
        places = np.arange(first, end)
        return places if layout.copies_N is None else np.repeat(places, layout.copies_N[first:end])


@dataclass(frozen=True)
class _Layout:
    """An epoch's shards in `order`, where each window ends in the epoch, where each shard's copies begin if numbered
    shard by shard, and how many copies each sample has (None: one)."""

    order: Rows
    window_ends: Rows
    begins: Rows
    copies_N: NDArray[np.int32] | None


def _kept(kept: dict[Hashable, _T], key: Hashable, make: Callable[[], _T]) -> _T:
    """Look up a value, or make it and drop the oldest: a batch touches one window, or two at a boundary."""
    if key not in kept:
        while len(kept) >= 2:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]
