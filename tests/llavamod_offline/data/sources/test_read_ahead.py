"""Reading several files at once: results in order, in bounded memory, each error in its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from llavamod_offline.data.sources.json_stream import Advance
from llavamod_offline.data.sources.read_ahead import read_ahead
from llavamod_offline.errors import DataError


def numbers(file: int, count: int, begun: list[int], advance: Advance) -> Iterator[tuple[int, int]]:
    for number in range(count):
        begun.append(file)
        advance(1)
        yield file, number
    advance(5)


def test_items_come_in_order_and_what_was_read_is_told() -> None:
    begun: list[int] = []
    told: list[int] = []
    makers = [partial(numbers, file, 3 * file, begun) for file in range(6)]
    found = list(read_ahead(makers, told.append))
    assert found == [(file, number) for file in range(6) for number in range(3 * file)]
    assert sum(told) == sum(3 * file + 5 for file in range(6))


def test_a_few_files_are_read_at_the_same_time_and_only_so_far_ahead() -> None:
    """The second file is being read before the first has yielded its second item; the fifth is not."""
    other = threading.Event()
    begun: list[int] = []

    def waiting(advance: Advance) -> Iterator[int]:
        yield 0
        assert other.wait(60)
        yield 1

    def setting(advance: Advance) -> Iterator[int]:
        other.set()
        yield from (n for n, _ in enumerate(numbers(1, 100, begun, advance)))

    def last(advance: Advance) -> Iterator[int]:
        begun.append(9)
        yield 7

    items = read_ahead([waiting, setting, last], lambda size: None, files=2, items=2)
    assert [next(items), next(items)] == [0, 1]
    assert 9 not in begun
    assert len(begun) <= 4
    assert list(items) == [*range(100), 7]


def test_an_error_comes_after_what_precedes_it() -> None:
    def failing(advance: Advance) -> Iterator[int]:
        yield 1
        raise DataError("broken")

    found: list[object] = []
    with pytest.raises(DataError, match="broken"):
        found.extend(read_ahead([partial(numbers, 0, 2, []), failing, failing], lambda size: None))
    assert found == [(0, 0), (0, 1), 1]


def test_threads_end_when_reading_is_given_up() -> None:
    before = threading.active_count()
    items = read_ahead([partial(numbers, file, 1000, []) for file in range(3)], lambda size: None)
    next(items)
    items.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and threading.active_count() > before:
            thread.join(10)
    assert threading.active_count() <= before
