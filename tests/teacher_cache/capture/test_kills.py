"""A run killed at any moment, or stopped by its disk, leaves a cache that is completed to the same digest."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.folders import open_folder
from teacher_cache.format.manifest import CACHE_NAME, MANIFEST_NAME, SEQUENCES_NAME, file_entries
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.repair import repair_cache
from teacher_cache.write.store import committed_shards
from tests.teacher_cache.capture.driver import NAMES, write_cache
from tests.teacher_cache.capture.killer import fork_server, repair_and_die, write_and_wait_for_it, write_until_killed

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that every test must end with."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    write_cache(path)
    return path


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is fast to flush, if there is one: hundreds of caches are written there."""
    quick = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=quick if os.access(quick, os.W_OK) else tmp_path))
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(whole: Path, memory_folder: Path) -> None:
    """SIGKILL from outside, after a random time: in the middle of a write as well as between two.

    The duration of a write is learnt along the way: if a process survives to its end, later ones are killed earlier.
    """
    expected = file_entries(whole)
    context = fork_server()
    generator = random.Random(0)
    longest = math.inf
    killed = 0
    for attempt in range(300):
        output = memory_folder / "c"
        here, there = context.Pipe()
        process = context.Process(target=write_and_wait_for_it, args=(str(output), there))
        process.start()
        here.recv()
        started = time.perf_counter()
        if attempt >= 3:
            time.sleep(generator.uniform(0, longest))
            process.kill()
        process.join()
        if process.exitcode == 0:
            longest = min(longest, time.perf_counter() - started) if attempt < 3 else 0.7 * longest
        else:
            assert process.exitcode == -signal.SIGKILL
            killed += 1
            longest *= 1.1
        write_cache(output)
        assert file_entries(output) == expected
        shutil.rmtree(output)
        if killed == 60:
            break
    assert killed >= 50


@pytest.mark.slow
def test_killed_before_any_change_on_disk_it_resumes_to_the_same_bytes(whole: Path, memory_folder: Path) -> None:
    expected = file_entries(whole)
    changes = write_until_killed(str(memory_folder / "counted"), sys.maxsize)
    assert changes is not None
    generator = random.Random(0)
    ends = {1, 2, 3, *range(changes - 6, changes + 1)}
    for moment in sorted(ends | set(generator.sample(range(4, changes - 6), 12))):
        output = memory_folder / f"c{moment}"
        assert write_until_killed(str(output), moment) is None
        assert not (output / CACHE_NAME).exists()
        if generator.random() < 0.4:  # and once more while it resumes
            write_until_killed(str(output), generator.randrange(1, changes // 2))
        write_cache(output)
        assert file_entries(output) == expected, f"killed before change {moment}"
        shutil.rmtree(output)


@pytest.mark.slow
def test_an_upload_killed_at_any_request_resumes_to_the_digest_of_the_disk(
    whole: Path, bucket: str, object_store_variables: dict[str, str]
) -> None:
    variables = {**object_store_variables, "LLAVAMOD_STAGING": os.environ["LLAVAMOD_STAGING"]}
    requests = write_until_killed(f"{bucket}/counted", sys.maxsize, variables)
    assert requests is not None
    generator = random.Random(0)
    digest = open_cache(whole).digest
    for moment in [1, 2, requests - 1, requests, *generator.sample(range(3, requests - 1), 4)]:
        output = f"{bucket}/c{moment}"
        assert write_until_killed(output, moment, variables) is None
        with pytest.raises(CacheError, match=r"unfinished|not a teacher cache"):
            open_cache(output)
        folder = open_folder(output)
        begun = {name.split("/")[0] for name in folder.sizes("shards") if name.endswith(MANIFEST_NAME)}
        assert committed_shards(folder, NAMES) == begun  # no manifest exists before the files that it names
        assert write_cache(output) == digest
        assert open_cache(output).digest == digest


@pytest.mark.slow
def test_a_repair_killed_at_any_change_never_leaves_a_cache_that_looks_whole(whole: Path, memory_folder: Path) -> None:
    """A half-deleted shard could be mistaken for a committed one."""
    expected = file_entries(whole)
    files = sum(name.startswith(f"shards/{NAMES[0]}/") for name in expected)
    context = fork_server()
    changes = 0
    for moment in (sys.maxsize, 1, 2, 3, 4, 5, 10, 20):
        output = Path(shutil.copytree(whole, memory_folder / f"c{moment}"))
        (output / "shards" / NAMES[0] / SEQUENCES_NAME).unlink()
        here, there = context.Pipe()
        process = context.Process(target=repair_and_die, args=(str(output), moment, there))
        process.start()
        process.join()
        changes = here.recv() if moment == sys.maxsize else changes
        assert process.exitcode == (-signal.SIGKILL if moment <= changes else 0)
        damaged = output / "shards" / NAMES[0]
        assert not damaged.exists() or len(file_entries(damaged)) == files - 1
        assert not (output / CACHE_NAME).exists() or damaged.exists()
        repair_cache(output)
        write_cache(output)
        assert file_entries(output) == expected, f"killed before change {moment}"
        shutil.rmtree(output)
