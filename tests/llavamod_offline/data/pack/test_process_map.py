"""Work in several processes: the same results in the same order, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llavamod_offline.data.pack.process_map import map_in_order
from llavamod_offline.errors import ConfigError, DataError


def double(items: list[int]) -> list[int]:
    time.sleep(0.02 if items[0] % 2 else 0.0)  # so that later lists are done before earlier ones
    return [2 * item for item in items]


def refuse(items: list[int]) -> list[int]:
    if 30 in items:
        raise DataError("thirty")
    return items


def die(items: list[int]) -> list[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return items


def stop(items: list[int]) -> list[int]:
    os.kill(os.getpid(), signal.SIGTERM)
    return items


def process(items: list[int]) -> list[int]:
    return [os.getpid()] * len(items)


def numbers(stop: int) -> Iterator[int]:
    """Numbers, then an error, as from a truncated file."""
    yield from range(stop)
    raise DataError("the file ends here")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 50])
def test_order(workers: int, n: int) -> None:
    assert list(map_in_order(double, range(n), workers=workers, chunk=3)) == [2 * number for number in range(n)]


def test_few_items_stay_here() -> None:
    here = os.getpid()
    assert set(map_in_order(process, range(7), workers=2, chunk=7)) == {here}
    assert here not in set(map_in_order(process, range(8), workers=2, chunk=7))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_have_their_turn(workers: int) -> None:
    """All results before an error are delivered, whether a worker or the input raises it."""
    cases: list[tuple[Callable[[list[int]], list[int]], Iterator[int], str, list[int]]] = [
        (refuse, iter(range(99)), "thirty", list(range(28))),
        (double, numbers(40), "the file ends here", [2 * number for number in range(40)]),
    ]
    for function, items, problem, expected in cases:
        found: list[int] = []
        with pytest.raises(DataError, match=problem):
            found.extend(map_in_order(function, items, workers=workers, chunk=7))
        assert found == expected


def test_few_items_are_taken_ahead() -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = map_in_order(double, counted(), workers=2, chunk=10)
    assert next(results) == 0
    assert taken <= 10 * (2 * 3 + 2)
    results.close()  # type: ignore[attr-defined]


def test_a_killed_process_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a worker process was killed.*fewer --workers"):
        list(map_in_order(die, range(30), workers=2, chunk=5))


def test_processes_leave_signals_to_their_parent() -> None:
    """A pool that loses a process while it starts another prints a traceback."""
    assert list(map_in_order(stop, range(30), workers=2, chunk=5)) == [*range(30)]


def test_no_workers() -> None:
    with pytest.raises(ConfigError, match="workers 0: must be at least 1"):
        list(map_in_order(double, range(3), workers=0, chunk=5))


PARENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from tests.llavamod_offline.data.pack.test_process_map import process
from llavamod_offline.data.pack.process_map import map_in_order
if __name__ == "__main__":
    results = map_in_order(process, iter(int, 1), workers=2, chunk=5)
    print(" ".join(map(str, {next(results) for _ in range(200)})), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_processes_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(Path(__file__).parents[4])]
    # Python's resource tracker complains on stderr about the kill.
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    children = [int(number) for number in parent.stdout.readline().split()]
    assert children
    assert all(Path(f"/proc/{child}").exists() for child in children)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 300
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if _runs(child)]


def _runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between open and read
        return False
