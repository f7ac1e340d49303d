"""A capture with processes that prepare images, stopped or killed: none of them is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample
from teacher_cache.read.reader import open_cache
from tests.processes import start, wait_until
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_samples

pytestmark = pytest.mark.slow
WORKERS = 2


def children_of(process: int) -> list[int]:
    """The processes that prepare images: those that Python spawned for work, not for its bookkeeping."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == process and "spawn_main" in command:
            found.append(int(folder.name))
    return found


def runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough samples that a capture can be stopped in the middle."""
    few = [sample for sample in tiny_samples(40) if sample.images]
    folder = tmp_path_factory.mktemp("many") / "set"
    copies = (
        Sample(f"{sample.key}-{number}", sample.turns, sample.images, sample.image_extensions)
        for number in range(60)
        for sample in few
    )
    write_set(copies, folder, shard_samples=300)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_process_is_left(number: signal.Signals, world: World, many: Path, tmp_path: Path) -> None:
    settings = world.arguments(tmp_path / "c", f"workers={WORKERS}", data=many)
    process = start(["cache-teacher", "run", *settings])
    wait_until(lambda: len(children_of(process.pid)) == WORKERS, process)
    wait_until(lambda: (tmp_path / "c" / "job.json").exists(), process)
    children = children_of(process.pid)
    assert len(children) == WORKERS
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 300
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if runs(child)]


def test_a_process_that_is_killed_changes_nothing(world: World, finished: Path, tmp_path: Path) -> None:
    process = start(["cache-teacher", "run", *world.arguments(tmp_path / "c", f"workers={WORKERS}")])
    wait_until(lambda: len(children_of(process.pid)) == WORKERS, process)
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "a process that prepares images died: starting new ones" in stderr
    assert "Traceback" not in stderr
    assert open_cache(tmp_path / "c").digest == open_cache(finished).digest
