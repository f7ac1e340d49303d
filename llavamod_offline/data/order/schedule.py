"""The micro-batches of each rank and step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llavamod_offline.data.order.stream import Order
from llavamod_offline.errors import ConfigError


@dataclass(frozen=True)
class BatchSchedule:
    """The micro-batches of one rank from step `start` up to `stop`, as a DataLoader's `batch_sampler`.

    A step has `micro_batches` lists of at most `micro_batch_size` rows each (None: the rank's whole share), the same
    number on every rank. A rank's share is a contiguous piece of the batch, so that neither micro-batches nor a loss
    that is not a sum over samples, such as the routers' balance loss, depend on the number of ranks. Batches sorted by
    length are dealt to the ranks one micro-batch at a time, so that all ranks work on similar lengths. To resume, begin
    at another `start`.
    Errors: `ConfigError` if a batch cannot be divided evenly.
    """

    order: Order
    stop: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        size, ranks = self.order.batch_size, self.world_size
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size {self.micro_batch_size}: must be at least 1")
        if not 0 <= self.rank < ranks:
            raise ConfigError(f"rank {self.rank} of {ranks}: must be from 0 to {ranks - 1}")
        if size % ranks:
            raise ConfigError(f"batch_size {size}: must be a multiple of the number of ranks, {ranks}")
        if self.order.lengths_N is not None and self._share % self._micro_size:
            raise ConfigError(
                f"batch_size {size}: must be a multiple of micro_batch_size {self._micro_size} × {ranks} ranks, "
                "if samples are grouped by length"
            )

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of a step."""
        return -(-self._share // self._micro_size)

    @property
    def _share(self) -> int:
        return self.order.batch_size // self.world_size

    @property
    def _micro_size(self) -> int:
        return self.micro_batch_size or self._share

    def step(self, step: int) -> list[list[int]]:
        """The micro-batches of one step on this rank."""
        size, rows = self._micro_size, self.order.batch(step).tolist()
        if self.order.lengths_N is not None:
            starts = range(self.rank * size, len(rows), self.world_size * size)
            return [rows[first : first + size] for first in starts]
        rows = rows[self.rank * self._share : (self.rank + 1) * self._share]
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield from self.step(step)
