"""Made-up sets to order, and a reference definition of the order, number by number."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

import numpy as np
from hypothesis import strategies as st

from llavamod_offline.data.order.copies import Weights
from llavamod_offline.data.order.stream import Order

ROWS = st.integers(1, 60)
SEEDS = st.integers(-(2**63), 2**64)
MASK = 2**64 - 1


def mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def reference_hash(number: int, seed: int, epoch: int, kind: int = 0) -> int:
    """The hash in Python integers; `kind` 1: shards, 2: turns, 3: batches."""
    gamma = 0x9E3779B97F4A7C15
    start = mix((seed + gamma) & MASK) ^ epoch
    for _ in range(kind + 1):
        start = mix(start)
    return mix((start + (number + 1) * gamma) & MASK)


@dataclass(frozen=True)
class Case:
    """A made-up set: samples per shard, window size, each sample's source and length; `weights` of the sources."""

    shards: tuple[int, ...]
    window: int
    sources: tuple[int, ...]
    weights: tuple[float, ...] | None
    lengths: tuple[int, ...] | None
    seed: int
    kinds: tuple[bool, ...] | None = None

    @property
    def n(self) -> int:
        return sum(self.shards)

    @property
    def shard_of(self) -> list[int]:
        return [shard for shard, size in enumerate(self.shards) for _ in range(size)]

    def order(self, batch_size: int) -> Order:
        weights = None if self.weights is None else Weights(np.array(self.sources), self.weights)
        return Order(
            self.n,
            seed=self.seed,
            batch_size=batch_size,
            shards_N=np.array(self.shard_of),
            window=self.window,
            weights=weights,
            lengths_N=None if self.lengths is None else np.array(self.lengths),
            kinds_N=None if self.kinds is None else np.array(self.kinds),
        )

    def copies(self, epoch: int) -> list[int]:
        """How often each sample must come in an epoch."""
        copies = [1] * self.n
        for source, weight in enumerate(self.weights or ()):
            members = [place for place in range(self.n) if self.sources[place] == source]
            wanted = max(1, floor(weight * len(members) + 0.5)) if weight and members else 0
            turns = sorted(members, key=lambda place: reference_hash(place, self.seed, 0, kind=2))
            extra = wanted % max(len(members), 1)
            for place in members:
                copies[place] = wanted // len(members)
            for turn in range(extra):
                copies[turns[(epoch * extra + turn) % len(turns)]] += 1
        return copies

    def epoch(self, epoch: int) -> tuple[list[int], list[tuple[int, int]]]:
        """An epoch's order of samples, lengths ignored, and its windows as (start, stop)."""
        copies = self.copies(epoch)
        entries = [place for place in range(self.n) for _ in range(copies[place])]
        there = sorted({self.shard_of[place] for place in entries})
        shards = sorted(there, key=lambda shard: reference_hash(shard, self.seed, epoch, kind=1))
        size = self.window or len(shards)
        found: list[int] = []
        windows = []
        for first in range(0, len(shards), size):
            inside = shards[first : first + size]
            numbers = [number for number, place in enumerate(entries) if self.shard_of[place] in inside]
            numbers.sort(key=lambda number: reference_hash(number, self.seed, epoch))
            windows.append((len(found), len(found) + len(numbers)))
            found += [entries[number] for number in numbers]
        return found, windows


@st.composite
def cases(draw: st.DrawFn, *, grouped: bool | None = None, by_kind: bool | None = False) -> Case:
    shards = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    n, kinds = sum(shards), draw(st.integers(1, 3))
    weight = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 3))
    weights = draw(st.none() | st.lists(weight, min_size=kinds, max_size=kinds).map(tuple))
    sources = tuple(draw(st.integers(0, kinds - 1)) for _ in range(n))
    if weights is not None and not any(weights[source] for source in sources):
        weights = None
    lengths = st.tuples(*[st.integers(1, 9)] * n)
    by_length = draw(st.booleans()) if grouped is None else grouped
    flags = st.tuples(*[st.booleans()] * n) if by_kind or (by_kind is None and draw(st.booleans())) else st.none()
    return Case(
        tuple(shards),
        draw(st.integers(0, 7)),
        sources,
        weights,
        draw(lengths) if by_length else None,
        draw(SEEDS),
        draw(flags),
    )
