"""The order of training as a pure function: which rows make up step `s`, for any number of ranks and workers.

One endless stream of rows is the permutation of epoch 0, then that of epoch 1, and so on. Step `s` of batch size `G`
takes the stream's rows `s·G … (s+1)·G − 1`. So no row is lost or doubled within an epoch; a batch at an epoch's end is
filled up from the next epoch; and the state of a run is one integer, the step. A permutation is defined by 64-bit
integer arithmetic alone and does not depend on any library's random generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import ConfigError

Rows = NDArray[np.int64]

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


@lru_cache(maxsize=2)  # a batch touches one epoch, or two at the seam
def epoch_order(n: int, seed: int, epoch: int) -> Rows:
    """The permutation of `range(n)` that epoch `epoch` goes through; read-only.

    Rows are sorted by the SplitMix64 hash (Steele, Lea and Flood, OOPSLA 2014) of (seed, epoch, row).
    """
    start = _mix(np.array([(seed + _GAMMA) & _MASK], dtype=np.uint64)) ^ np.uint64(epoch)
    with np.errstate(over="ignore"):
        inputs_n = _mix(start) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    order_n = np.argsort(_mix(inputs_n), kind="stable").astype(np.int64)
    order_n.flags.writeable = False
    return order_n


def stream_rows(start: int, stop: int, *, n: int, seed: int) -> list[int]:
    """The rows at places `start … stop − 1` of the endless stream over `n` rows."""
    if n < 1:
        raise ConfigError(f"sampler: {n} rows to choose from: the set or what is left of it is empty")
    rows: list[int] = []
    while start < stop:
        epoch, offset = divmod(start, n)
        piece = epoch_order(n, seed, epoch)[offset : offset + stop - start]
        rows += piece.tolist()
        start += len(piece)
    return rows


def global_batch(step: int, *, n: int, batch_size: int, seed: int) -> list[int]:
    """The `batch_size` rows of one step (from 0), over all ranks."""
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: must be at least 1")
    return stream_rows(step * batch_size, (step + 1) * batch_size, n=n, seed=seed)


def rank_batch(step: int, *, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> list[int]:
    """The rows of one step that `rank` of `world_size` takes: its share of the global batch, in one piece.

    In one piece, so that a step's micro-batches are the same on any number of ranks that their size allows: a loss that
    is no mere sum over samples, such as the routers' balance, is the same then too.
    Errors: `ConfigError` if the batch cannot be dealt out evenly.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size}: must be from 0 to {world_size - 1}")
    if batch_size % world_size:
        raise ConfigError(f"batch_size {batch_size}: must be a multiple of the number of ranks, {world_size}")
    share = batch_size // world_size
    return global_batch(step, n=n, batch_size=batch_size, seed=seed)[rank * share : (rank + 1) * share]


@dataclass(frozen=True)
class BatchSchedule:
    """The micro-batches of one rank from step `start` up to `stop`, as a DataLoader's `batch_sampler` wants them.

    A step gives `micro_batches` lists of at most `micro_batch_size` rows each (None: the rank's whole share), the same
    number on every rank. To resume is to begin at another `start`.
    """

    n: int
    batch_size: int
    seed: int
    stop: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size {self.micro_batch_size}: must be at least 1")
        self.step_rows(self.start)  # settings that do not fit together are an error before the first step

    @property
    def micro_batches(self) -> int:
        """How many micro-batches make up a step."""
        share = self.batch_size // self.world_size
        return -(-share // (self.micro_batch_size or share))

    def step_rows(self, step: int) -> list[int]:
        """The rows of one step on this rank."""
        return rank_batch(
            step, n=self.n, batch_size=self.batch_size, seed=self.seed, rank=self.rank, world_size=self.world_size
        )

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            rows = self.step_rows(step)
            size = self.micro_batch_size or len(rows)
            yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, element by element."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
