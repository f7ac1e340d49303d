"""Staged copies are complete, shared, bounded in size, and never removed while someone reads them."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.errors import ConfigError, StorageError
from llavamod_offline.storage.disk_cache import DiskCache, scratch, staging_bytes, staging_folder

SIZE = 1000


def filler(content: bytes = b"x" * SIZE, calls: list[int] | None = None) -> Callable[[Path], None]:
    """A function that fills a unit with one file and counts its calls."""

    def fill(aside: Path) -> None:
        if calls is not None:
            calls.append(1)
        (aside / "data").write_bytes(content)

    return fill


def units(staging: DiskCache) -> set[str]:
    """The units present."""
    return {path.name for path in staging.folder.iterdir() if path.is_dir()}


def staged(staging: DiskCache) -> int:
    """The bytes on disk, whatever state they are in."""
    total = 0
    for folder, _, files in os.walk(staging.folder):
        for name in set(files) & {"data"}:
            with suppress(FileNotFoundError):  # removed while we look
                total += (Path(folder) / name).stat().st_size
    return total


def test_a_unit_is_made_once(tmp_path: Path) -> None:
    staging = DiskCache(tmp_path / "deep" / "s", 10 * SIZE)
    assert not staging.folder.exists()
    calls: list[int] = []
    for _ in range(3):
        with staging.hold("a", SIZE, filler(calls=calls)) as unit:
            assert unit == staging.path("a")
            assert (unit / "data").read_bytes() == b"x" * SIZE
    assert len(calls) == 1


def test_the_least_recently_used_leave_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use is ordered by file times; here each use gets a time of its own, however quickly they follow each other."""
    touch, uses = os.utime, itertools.count(1)
    monkeypatch.setattr(os, "utime", lambda file: touch(file, (number := next(uses), number)))
    staging = DiskCache(tmp_path, 3 * SIZE)
    for name in ("a", "b", "c", "a", "d"):
        with staging.hold(name, SIZE, filler()):
            pass
        assert staged(staging) <= 3 * SIZE
    assert units(staging) == {"a", "c", "d"}
    with staging.hold("large", 3 * SIZE, filler(b"y" * 3 * SIZE)):
        assert units(staging) == {"large"}
    assert {path.name for path in tmp_path.glob("*.lock")} == {".lock", "large.lock"}


def test_what_is_held_stays_and_others_wait(tmp_path: Path) -> None:
    staging = DiskCache(tmp_path, 2 * SIZE)
    order: list[str] = []

    def other() -> None:
        with staging.hold("c", 2 * SIZE, filler(b"y" * 2 * SIZE)):
            order.append("other")

    with staging.hold("a", SIZE, filler()) as unit:
        thread = threading.Thread(target=other)
        thread.start()
        with staging.hold("b", SIZE, filler()):
            pass
        time.sleep(0.1)
        assert (unit / "data").exists()
        order.append("mine")
    thread.join()
    assert order == ["mine", "other"]
    assert units(staging) == {"c"}


def test_a_unit_larger_than_the_bound_is_refused(tmp_path: Path) -> None:
    staging = DiskCache(tmp_path, SIZE - 1)
    with pytest.raises(StorageError, match=r"1,000 bytes exceed the limit of 999: raise LLAVAMOD_STAGING_GB"):
        staging.hold("a", SIZE, filler()).__enter__()


def test_a_failed_unit_leaves_nothing(tmp_path: Path) -> None:
    staging = DiskCache(tmp_path, 10 * SIZE)

    def full(aside: Path) -> None:
        (aside / "data").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(aside: Path) -> None:
        (aside / "data").write_bytes(b"half")
        raise ValueError("odd")

    cases = ((full, StorageError, "No space left on device: set LLAVAMOD"), (broken, ValueError, "odd"))
    for fill, error, words in cases:
        with pytest.raises(error, match=words):
            staging.hold("a", SIZE, fill).__enter__()
        assert units(staging) == set()
    with staging.hold("a", SIZE, filler()):
        assert units(staging) == {"a"}


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path) -> None:
    staging = DiskCache(tmp_path, 2 * SIZE)

    def die(aside: Path) -> None:
        (aside / "half").write_bytes(b"")
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=lambda: staging.hold("a", SIZE, die).__enter__())
    process.start()
    process.join()
    assert units(staging) == {"a.tmp"}
    with staging.hold("a", SIZE, filler()) as unit:
        assert [path.name for path in unit.iterdir()] == ["data"]
        assert units(staging) == {"a"}
    process = multiprocessing.get_context("fork").Process(target=lambda: staging.hold("b", SIZE, die).__enter__())
    process.start()
    process.join()
    with staging.hold("c", 2 * SIZE, filler(b"y" * 2 * SIZE)):  # b is never read again: its remains make room
        assert units(staging) == {"c"}


def _read_much(folder: Path, seed: int, failures: multiprocessing.SimpleQueue[str]) -> None:
    staging = DiskCache(folder, 4 * SIZE)
    generator = random.Random(seed)
    for _ in range(60):
        name = generator.choice("abcdefgh")
        content = name.encode() * SIZE
        with staging.hold(name, SIZE, filler(content)) as unit:
            if (unit / "data").read_bytes() != content:
                failures.put(f"{name}: not whole")
            if staged(staging) > 4 * SIZE:
                failures.put("too much")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_share_a_small_space(tmp_path: Path, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    failures = context.SimpleQueue()
    processes = [context.Process(target=_read_much, args=(tmp_path, seed, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert failures.empty()


def test_a_process_forked_by_another_thread_does_not_keep_a_unit(tmp_path: Path) -> None:
    """A lock lives as long as any copy of its descriptor, unless it is released explicitly."""
    staging = DiskCache(tmp_path, SIZE)
    ready, wait = multiprocessing.Pipe()
    with staging.hold("a", SIZE, filler()):
        child = multiprocessing.get_context("fork").Process(target=wait.recv, daemon=True)
        child.start()

    def take_its_place() -> None:
        with staging.hold("b", SIZE, filler()):
            pass

    thread = threading.Thread(target=take_its_place, daemon=True)
    thread.start()
    thread.join(300)
    assert not thread.is_alive(), "the child keeps the unit"
    assert units(staging) == {"b"}
    ready.send(None)
    child.join()


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "data").write_text("mine")
    staging = DiskCache(tmp_path, SIZE)
    for name in ("a", "b"):
        with staging.hold(name, SIZE, filler()):
            pass
    assert units(staging) == {"b", "thesis"}


def test_the_place_and_the_bound_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LLAVAMOD_STAGING", "LLAVAMOD_STAGING_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert staging_folder() == tmp_path / "llavamod-offline" / "staging"
    assert staging_bytes() == 20 * 10**9
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "here"))
    monkeypatch.setenv("LLAVAMOD_STAGING_GB", "0.5")
    assert staging_folder() == tmp_path / "here"
    assert DiskCache().limit_bytes == 500_000_000
    for value in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("LLAVAMOD_STAGING_GB", value)
        with pytest.raises(ConfigError, match="LLAVAMOD_STAGING_GB"):
            staging_bytes()


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used: Not a directory: set LLAVAMOD_STAGING to another folder"):
        DiskCache(tmp_path / "file" / "s", SIZE).hold("a", 1, filler()).__enter__()
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "file" / "s"))
    with pytest.raises(StorageError, match="Not a directory"):
        scratch().__enter__()


def test_a_file_system_without_locks_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NFS without its lock service, Lustre mounted without flock."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("llavamod_offline.storage.disk_cache.fcntl.flock", flock)
    with pytest.raises(StorageError, match="No locks available: set LLAVAMOD_STAGING to another folder"):
        DiskCache(tmp_path / "s", SIZE).hold("a", 1, filler()).__enter__()


def test_a_disk_that_fills_up_below_a_scratch_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "s"))
    with (
        pytest.raises(StorageError, match="s: cannot be used: No space left on device: set LLAVAMOD_STAGING"),
        scratch(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileExistsError), scratch():
        raise FileExistsError
    assert list((tmp_path / "s").iterdir()) == []


def test_scratch_folders_vanish_also_those_of_the_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "s"))

    def die() -> None:
        with scratch() as folder:
            (folder / "data").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert len(list((tmp_path / "s").iterdir())) == 1
    with scratch() as one, scratch() as two:
        assert one != two
        assert len(list((tmp_path / "s").iterdir())) == 2
    assert list((tmp_path / "s").iterdir()) == []


def test_a_lock_is_on_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes a unit and its lock file between our opening that file and locking it."""
    staging = DiskCache(tmp_path, SIZE)
    lock = fcntl.flock
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
    calls: list[int] = []

    def late(file: int, operation: int) -> None:
        calls.append(operation)
        if operation == exclusive and calls.count(exclusive) == 1:
            (tmp_path / "a.lock").unlink()
        lock(file, operation)

    def fill(aside: Path) -> None:
        with (tmp_path / "a.lock").open() as other, pytest.raises(BlockingIOError):
            lock(other, exclusive)
        filler()(aside)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with staging.hold("a", SIZE, fill) as unit:
            assert (unit / "data").exists()
