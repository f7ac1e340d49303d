"""A full disk, a file too large, a folder that cannot be written: one clear line, and a cache that can be continued."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from llavamod_offline.errors import CacheError, LlavaModError
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from tests.teacher_cache.capture.driver import NAMES, write_cache
from tests.teacher_cache.capture.killer import fork_server

ROOT = Path(__file__).parents[3]

# In a mount namespace of its own: a file system that grows a little whenever the run has filled it.
FILL = """
import json, subprocess, sys
from pathlib import Path
from llavamod_offline.errors import CacheError
from tests.teacher_cache.capture.driver import write_cache
folder, size, stops = Path(sys.argv[1]), 4, []
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
while True:
    try:
        digest = write_cache(folder / "c")
    except CacheError as error:
        stops.append(str(error))
        size += 12
        subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    else:
        break
print(json.dumps({"digest": digest, "stops": stops}))
"""


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the cache that every test must end with."""
    return str(write_cache(tmp_path_factory.mktemp("whole") / "cache"))


def in_a_process(function: Callable[..., str], *arguments: object) -> str:
    """Call `function` in a process of its own; return its result, or the project's error that it raises."""
    here, there = fork_server().Pipe()
    process = fork_server().Process(target=_call, args=(there, function, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0
    said: str = here.recv()
    return said


def _call(there: Connection, function: Callable[..., str], arguments: tuple[object, ...]) -> None:
    try:
        there.send(function(*arguments))
    except LlavaModError as error:
        there.send(f"{type(error).__name__}: {error}")
    os._exit(0)  # user `nobody` may not even clean up


def _may_mount() -> bool:
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _may_mount(), reason="no mount namespaces for users here")
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tmp_path: Path, digest: str) -> None:
    command = ["unshare", "-Urm", sys.executable, "-c", FILL, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["digest"] == digest
    assert len(said["stops"]) >= 8  # before job.json, in the columns of either shard, before cache.json
    for stop in said["stops"]:
        assert "cannot be written: No space left on device: " in stop
        assert "\n" not in stop
    assert any(NAMES[0] in stop for stop in said["stops"])
    assert any(NAMES[1] in stop for stop in said["stops"])


def _write_small_files(where: str, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return str(write_cache(where))


def test_a_file_that_may_not_grow_stops_the_run(tmp_path: Path, digest: str) -> None:
    for limit in (0, 100, 700, 1500):
        said = in_a_process(_write_small_files, str(tmp_path / "c"), limit)
        assert said.startswith("CacheError: ")
        assert "cannot be written: File too large: " in said
        assert not list(tmp_path.rglob("*.tmp"))
    assert write_cache(tmp_path / "c") == digest


def _write_as_nobody(where: str, warm: str) -> str:
    write_cache(warm)  # imports modules that only this user may read
    if os.geteuid() == 0:  # root may write anywhere
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return str(write_cache(where))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "open"
        folder.mkdir()
        yield folder


@pytest.mark.parametrize("closed", ["output", "shards", "above"])
def test_a_folder_that_may_not_be_written_stops_the_run(open_folder: Path, digest: str, closed: str) -> None:
    output = open_folder / "c"
    output.parent.chmod(0o555 if closed == "above" else 0o777)
    if closed != "above":
        write_cache(output, part=(1, 2))
        for folder in (output, output / "shards"):
            folder.chmod(0o777)
        (output if closed == "output" else output / "shards").chmod(0o555)
    said = in_a_process(_write_as_nobody, str(output), str(open_folder.parent / "warm"))
    assert said.startswith("CacheError: ")
    assert "cannot be written: Permission denied: " in said
    for folder in (output.parent, output, output / "shards"):
        if folder.exists():
            folder.chmod(0o755)
    assert write_cache(output) == digest
    assert verify_cache(output).ok


def test_a_read_only_cache_can_be_read(tmp_path: Path, digest: str) -> None:
    write_cache(tmp_path / "c")
    for path in (tmp_path / "c").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert open_cache(tmp_path / "c").digest == verify_cache(tmp_path / "c").digest == digest
    with pytest.raises(CacheError, match="no record"):
        open_cache(tmp_path / "c").target_ids("none", "response")
