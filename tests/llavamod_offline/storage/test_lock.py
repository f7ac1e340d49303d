"""Locks on outputs: one writer at a time, whatever happened to the last one."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.folders import open_folder
from llavamod_offline.storage.lock import LOCK_NAME, LockOwner, check_unlocked, locked, locked_beside

_HOLD = """
import os, sys
from llavamod_offline.storage.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(where: str | Path, **changes: Any) -> None:
    """Leave a lock file of this process behind, with some fields changed."""
    owner = replace(LockOwner.this_process(), **changes)
    open_folder(where).write(LOCK_NAME, json.dumps(asdict(owner)).encode())


def refusal(where: str | Path) -> str:
    with pytest.raises(ConfigError) as caught, locked(where):
        raise AssertionError
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["disk", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output on a disk, or in a store without renames."""
    return str(tmp_path / "runs" / "one") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/one"


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    first = hold(tmp_path / "run")
    before = (tmp_path / "run" / LOCK_NAME).read_bytes()
    found = refusal(tmp_path / "run")
    assert found.startswith(f"output: {tmp_path / 'run'} is in use by process {first.pid}, since 20")
    assert found.endswith("choose another output")
    assert (tmp_path / "run" / LOCK_NAME).read_bytes() == before
    with pytest.raises(ConfigError, match="is in use"):
        check_unlocked(tmp_path / "run")
    first.communicate("")
    check_unlocked(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).is_file()


def test_it_is_released_after_an_error_and_leaves_no_folder_that_was_not_used(where: str) -> None:
    def fail() -> None:
        with locked(where):
            assert "is in use by process" in refusal(where)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    folder = open_folder(where)
    assert folder.names() == set()
    assert not Path(where).parent.exists()
    with locked(where):
        folder.write("kept", b"")
    assert folder.names() == {"kept"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, number: int) -> None:
    first = hold(tmp_path / "run")
    first.send_signal(number)
    first.communicate()
    assert (tmp_path / "run" / LOCK_NAME).is_file()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_NAME).read_bytes())["process"] == os.getpid()


def test_a_killed_process_that_its_parent_has_not_waited_for_is_gone(tmp_path: Path) -> None:
    first = hold(tmp_path / "run")
    first.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    with locked(tmp_path / "run"):
        pass
    first.communicate()


def test_a_process_number_that_was_used_again_is_no_owner(where: str) -> None:
    leave(where, started="1")
    with locked(where):
        pass


def test_another_host_is_explained(where: str) -> None:
    leave(where, host="node17", process=4711, since="2026-01-02T03:04:05+00:00", command="train-student sft x=y")
    found = refusal(where)
    for expected in ("process 4711 on host node17, since 2026-01-02T03:04:05+00:00", "`train-student sft x=y`"):
        assert expected in found
    assert found.endswith(f"or, if it has ended, delete {where}/{LOCK_NAME}")
    assert ("its files last changed 0 s ago" in found) == (not where.startswith("memory:"))
    open_folder(where).remove_files([LOCK_NAME])
    with locked(where):
        pass


def test_a_requeued_job_follows_its_first_attempt_on_any_host(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM requeues a job only once its first attempt has ended."""
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    leave(where, host="node17", job="99", restart="0")
    assert "on host node17" in refusal(where)  # another step of the same attempt
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(where):
        pass


def test_a_damaged_lock_is_explained(where: str) -> None:
    open_folder(where).write(LOCK_NAME, b"{")
    assert "damaged: if nothing writes there, delete it" in refusal(where)


@pytest.mark.slow
def test_slices_exclude_what_writes_everything_but_not_each_other(where: str) -> None:
    first, second = f"{LOCK_NAME}-0-of-4", f"{LOCK_NAME}-3-of-4"
    with locked(where, first), locked(where, second):
        assert "is in use by process" in refusal(where)
    with locked(where):
        with pytest.raises(ConfigError, match="is in use by process"), locked(where, second):
            raise AssertionError
        assert open_folder(where).names() == {LOCK_NAME}
    with locked(where, ".set.lock-0-of-2"), locked(where):  # of another output
        pass


def test_any_command_line_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File names from old archives may not be UTF-8."""
    monkeypatch.setattr(sys, "argv", ["pack", os.fsdecode(b"caf\xe9.json")])
    with locked(tmp_path):
        assert "caf" in refusal(tmp_path)


def test_a_bucket_is_locked_as_a_disk_is(bucket: str) -> None:
    where = f"{bucket}/caches/one"
    with locked(where):
        assert "is in use by process" in refusal(where)
    assert open_folder(where).names() == set()
    leave(where, started="1")
    with locked(where):
        assert open_folder(where).names() == {LOCK_NAME}
    leave(where, host="node17")
    assert refusal(where).endswith(f"delete {where}/{LOCK_NAME}")


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        assert refusal(output).startswith(f"output: {output} cannot be written (")


def test_an_output_that_must_not_exist_yet_is_locked_beside_it(tmp_path: Path) -> None:
    with locked_beside(tmp_path / "a.b"):
        assert not (tmp_path / "a.b").exists()
        with pytest.raises(ConfigError, match=f"output: {tmp_path / 'a.b'} is in use"), locked_beside(tmp_path / "a.b"):
            pass
        with locked_beside(tmp_path / "a"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_fork_does_not_release_it(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from llavamod_offline.storage.lock import LOCK_NAME, locked
folder = Path(sys.argv[1])
with locked(folder):
    child = os.fork()
    if not child:
        sys.exit()  # unwinds what it has inherited
    os.waitpid(child, 0)
    print((folder / LOCK_NAME).is_file())
print((folder / LOCK_NAME).is_file())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_signal_during_an_import_releases_it_too(tmp_path: Path) -> None:
    """Then the process ends without unwinding."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    code = """
import sys
from llavamod_offline import signals
from llavamod_offline.storage.lock import locked
signals.watch()
with signals.interruptible(), locked(sys.argv[1]):
    import slow
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not (tmp_path / "run").exists()


_CROWD = """
import os, random, sys, time
from pathlib import Path
from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.lock import locked
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
rng, inside = random.Random(seed), folder / "inside"
for _ in range(60):
    try:
        with locked(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another one is inside
            time.sleep(rng.uniform(0, 0.002))
            inside.unlink()
            if rng.random() < 0.05:
                os.kill(os.getpid(), 9)
    except ConfigError:
        time.sleep(rng.uniform(0, 0.002))
"""


def test_of_many_that_find_the_lock_of_a_killed_one_only_one_gets_it(tmp_path: Path) -> None:
    """Processes take it, release it and die holding it: never do two hold it, and nobody is locked out for good."""
    (tmp_path / "crowd.py").write_text(_CROWD)
    folder = tmp_path / "run"
    folder.mkdir()
    rng = random.Random(0)
    killed = 0
    for _ in range(3):
        leave(folder, started="1")
        command = [sys.executable, str(tmp_path / "crowd.py"), str(folder)]
        crowd = [subprocess.Popen([*command, str(rng.getrandbits(32))], stderr=subprocess.PIPE) for _ in range(6)]
        for process in crowd:
            _, errors = process.communicate()
            assert not errors, errors.decode()
            assert process.returncode in (0, -signal.SIGKILL)
            killed += process.returncode != 0
    assert killed
    with locked(folder):
        pass


def test_the_host_and_the_start_of_this_process_are_known() -> None:
    owner = LockOwner.this_process()
    assert owner.host == platform.node()
    assert not owner.is_gone
    assert replace(owner, process=2**22 + 1).is_gone
    assert not replace(owner, process=2**22 + 1, host="elsewhere").is_gone


def test_a_process_of_another_container_of_this_name_is_not_taken_for_gone() -> None:
    """Its process id may be unused here, or belong to another process."""
    gone = replace(LockOwner.this_process(), process=999_999_999)
    assert gone.is_gone
    assert not replace(gone, space="another").is_gone
