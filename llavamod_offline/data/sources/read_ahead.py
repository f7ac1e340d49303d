"""Read several files at once, in threads, while their contents are consumed in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from llavamod_offline.data.sources.json_stream import Advance

_Item = TypeVar("_Item")
Make = Callable[[Advance], Iterator[_Item]]
_WAIT_SECONDS = 0.1


def read_ahead(makers: Iterable[Make[_Item]], advance: Advance, *, files: int = 4, items: int = 2) -> Iterator[_Item]:
    """Yield the items of one iterator after another; threads run the first `files` of them, `items` ahead each.

    So memory holds at most `files` × (`items` + 1) items besides what the iterators hold. `advance` is called in this
    thread, with what the iterator passed to its own before the item. An iterator's error is raised in its turn.
    """
    readers: deque[_Reading[_Item]] = deque()
    waiting = iter(makers)
    try:
        while True:
            while len(readers) < files and (make := next(waiting, None)) is not None:
                readers.append(_Reading(make, items))
            if not readers:
                return
            yield from readers[0].items(advance)
            readers.popleft()
    finally:
        for reader in readers:
            reader.close()


class _Reading(Generic[_Item]):
    """An iterator that a thread runs."""

    def __init__(self, make: Make[_Item], ahead: int) -> None:
        self._queue: queue.Queue[tuple[int, list[_Item], BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._told = 0
        threading.Thread(target=self._run, args=(make,), daemon=True).start()

    def items(self, advance: Advance) -> Iterator[_Item]:
        """Its items, as they arrive."""
        while True:
            told, found, error = self._queue.get()
            advance(told)
            if error is not None:
                raise error
            if not found:
                return
            yield found[0]

    def close(self) -> None:
        """Stop the thread at its next item."""
        self._closed.set()

    def _run(self, make: Make[_Item]) -> None:
        error = None
        try:
            for item in make(self._advance):
                if not self._put([item]):
                    return
        except BaseException as problem:
            error = problem
        self._put([], error)

    def _advance(self, size: int) -> None:
        self._told += size

    def _put(self, found: list[_Item], error: BaseException | None = None) -> bool:
        told, self._told = self._told, 0
        while not self._closed.is_set():
            try:
                self._queue.put((told, found, error), timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return True
        return False
