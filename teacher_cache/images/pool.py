"""Preparing samples' images ahead of the teacher: in processes beside it, or in threads of its own process.

Processes leave the teacher's process its core and its interpreter, which on a GPU decide how fast work is submitted.
Their results are the same, to the last bit. Nothing is queued here: the caller decides how far ahead to submit.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import ModelError
from llavamod_offline.families import Family
from llavamod_offline.processes import ProcessPool
from teacher_cache.images.shared_memory import SharedImages
from teacher_cache.images.waits import Waits

_LOG = logging.getLogger(__name__)
THREADS = 4
_Item = TypeVar("_Item")
_Begun = TypeVar("_Begun")
_DEATHS = 3  # process deaths allowed with the same sample


def begun_ahead(
    items: Sequence[_Item], begin: Callable[[_Item], _Begun], *, ahead: int
) -> Iterator[tuple[_Item, _Begun]]:
    """Yield each item with what `begin` gave for it; by then it has been called for `ahead` further items."""
    coming = deque[_Begun]()
    for number, item in enumerate(items):
        for later in items[number + len(coming) : number + 1 + ahead]:
            coming.append(begin(later))
        yield item, coming.popleft()


class ImagePool:
    """Prepares images with `images` in threads, or in `workers` processes, each with what `opened` opens there.

    `opened` must be picklable. Processes start with the first sample, and end with this object or its process.
    """

    def __init__(
        self,
        images: Callable[[Sample], Any],
        *,
        workers: int = 0,
        opened: Callable[[], Family] | None = None,
        waits: Waits | None = None,
    ) -> None:
        self.waits = waits or Waits()
        self._images, self._workers, self._opened = images, workers, opened
        self._processes: ProcessPool | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="images")
        self._deaths = 0  # process pools that have died

    @contextmanager
    def ahead(self) -> Iterator[Callable[[Sample], PreparedImages]]:
        """A function that submits samples ahead; those not begun at the end of the block are dropped."""
        given: WeakSet[Future[Any]] = WeakSet()

        def submit(sample: Sample) -> PreparedImages:
            prepared = PreparedImages(self, sample)
            given.add(prepared.future)
            return prepared

        try:
            yield submit
        finally:
            for future in given:
                future.cancel()

    def begin(self) -> None:
        """Start the processes, if there are to be any, before they are needed."""
        for _ in range(self._workers):
            self._pool().submit(_nothing)

    def close(self) -> None:
        """End the processes and threads."""
        self._threads.shutdown(cancel_futures=True)
        if self._processes is not None:
            self._processes.close()

    def submit(self, sample: Sample) -> tuple[Future[Any], int]:
        """Begin to prepare a sample's images; also gives the process pool's number: how many pools have died."""
        if not self._workers or not sample.images:
            return self._threads.submit(self._images, sample), self._deaths
        return self._pool().submit(_prepare, sample), self._deaths

    def restart(self, died: int) -> None:
        """Replace pool number `died`, which has lost a process, unless another sample already has."""
        if died == self._deaths and self._processes is not None:
            _LOG.warning("a process that prepares images died: starting new ones")
            self._processes, self._deaths = None, self._deaths + 1

    def _pool(self) -> ProcessPool:
        if self._processes is None:
            assert self._opened is not None
            self._processes = ProcessPool(self._workers, partial(_begin, self._opened))
        return self._processes


@dataclass(eq=False)
class PreparedImages:
    """A sample's images, which may still be in preparation."""

    pool: ImagePool
    sample: Sample
    future: Future[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._submit()

    def result(self) -> Any:
        """Wait for them, and count the wait. Errors: those of preparing; `ModelError` if that kills processes."""
        if not self.future.done():
            with self.pool.waits.waiting("images"):
                return self._result()
        return self._result()

    def _result(self) -> Any:
        for left in reversed(range(_DEATHS)):
            try:
                found = self.future.result()
            except BrokenProcessPool:  # perhaps by another sample's images
                self.pool.restart(self._pool_number)
                if left:
                    self._submit()
            else:
                return found.images if isinstance(found, SharedImages) else found
        raise ModelError(
            f"sample '{self.sample.key}': {_DEATHS} processes died while they prepared its images: if memory ran out, "
            "lower workers (0: no processes), and rerun to resume"
        )

    def _submit(self) -> None:
        for _ in range(_DEATHS):
            try:
                self.future, self._pool_number = self.pool.submit(self.sample)
            except BrokenProcessPool:
                self.pool.restart(self.pool._deaths)
            else:
                return
        raise ModelError("processes that prepare images cannot be started: set workers=0, and rerun to resume")


_family: Family | None = None  # in a process that prepares images


def _begin(opened: Callable[[], Family]) -> None:
    """Open the family in a process, without warnings: its parent has already logged them."""
    import torch

    global _family
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _family = opened()


def _nothing() -> None:
    """Do nothing: once this returns, the process has started."""


def _prepare(sample: Sample) -> SharedImages:
    assert _family is not None
    return SharedImages(_family.images(sample))
