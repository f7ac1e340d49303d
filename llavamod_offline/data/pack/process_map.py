"""Process many items in several processes, with results in the order of the items.

Processes, not threads: decoding an image sets global switches of Pillow, which apply to a whole process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.processes import ProcessPool

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Value = TypeVar("_Value")
_AHEAD = 2  # queued lists of items per process


class WorkerLostError(DataError):
    """A process was killed; the work itself may be fine."""


def map_in_order(
    function: Callable[[list[_Item]], list[_Result]], items: Iterable[_Item], *, workers: int, chunk: int
) -> Iterator[_Result]:
    """Apply `function` to lists of `chunk` items in `workers` processes; yield the results in the items' order.

    `function` and items must be picklable. With one worker, or few items, everything runs in this process. Items are
    consumed lazily: memory holds a few lists per process.
    Errors: those of `function`; `ConfigError` for no workers; `WorkerLostError` if a process dies.
    """
    if workers < 1:
        raise ConfigError(f"workers {workers}: must be at least 1")
    lists = _lists(items, chunk)
    if workers > 1:
        first = list(islice(lists, 2))  # starting processes costs more than a short list's work
        lists = chain(first, lists)
        workers = 1 if len(first) < 2 else workers
    if workers == 1:
        for part in lists:
            yield from function(_unless_failed(part))
        return
    pool = ProcessPool(workers)
    pending: deque[Future[list[_Result]] | Exception] = deque()
    try:
        for part in lists:
            pending.append(part if isinstance(part, Exception) else pool.submit(function, part))
            if len(pending) > workers * (1 + _AHEAD):
                yield from _unless_failed(pending.popleft()).result()
        while pending:
            yield from _unless_failed(pending.popleft()).result()
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a worker process was killed, perhaps by running out of memory: use fewer --workers"
        ) from error
    finally:
        pool.close()


def _lists(items: Iterable[_Item], chunk: int) -> Iterator[list[_Item] | Exception]:
    """Lists of items; if taking them fails, the error comes last, after the items before it."""
    part: list[_Item] = []
    failure = None
    try:
        for item in items:
            part.append(item)
            if len(part) == chunk:
                yield part
                part = []
    except Exception as error:
        failure = error
    if part:
        yield part
    if failure is not None:
        yield failure


def _unless_failed(value: _Value | Exception) -> _Value:
    if isinstance(value, Exception):
        raise value
    return value
