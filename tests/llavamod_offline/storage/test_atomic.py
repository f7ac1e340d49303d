"""Files and folders appear completely or not at all, whenever their writer is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.errors import StorageError
from llavamod_offline.storage import atomic
from llavamod_offline.storage.atomic import create_file, new_folder, remove_folder, remove_leftovers, write_file

KILLED_FOLDER = """
import os, signal, sys
from pathlib import Path
from llavamod_offline.storage.atomic import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Killed once everything is written and flushed, right at the rename.
KILLED_FILE = """
import os, signal, sys
from pathlib import Path
from llavamod_offline.storage import atomic
Path.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
atomic.write_file(Path(sys.argv[1]), "new")
"""


def run_killed(program: str, target: Path) -> None:
    result = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert result.returncode == -signal.SIGKILL


def test_a_killed_writer_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "set"
    run_killed(KILLED_FOLDER, target)
    assert not target.exists()
    assert [aside.name.endswith(".tmp") for aside in tmp_path.iterdir()] == [True]
    remove_leftovers(tmp_path, "set")
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "set.json"
    target.write_text("old")
    run_killed(KILLED_FILE, target)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path, "set.json")
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "set"
    with new_folder(target) as folder:
        (folder / "a").write_text("a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("b")
        assert not target.exists()
    assert (target / "sub" / "b").read_text() == "b"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "set") as folder:
            (folder / "a").write_text("a")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "set"

    def write_beside_another() -> None:
        with new_folder(target) as folder:
            (folder / "a").write_text("a")
            target.mkdir()  # someone else was faster
            (target / "theirs").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        write_beside_another()
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]


def test_write_file_replaces_and_takes_text_and_bytes(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_file(target, "é")
    assert target.read_bytes() == "é".encode()
    write_file(target, b"\0")
    assert target.read_bytes() == b"\0"
    assert list(tmp_path.iterdir()) == [target]


def test_write_file_that_fails_leaves_the_old(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_file(target, "\ud800")
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "none" / "file", "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_running_processes_stay(tmp_path: Path) -> None:
    running = tmp_path / f".set.{os.getppid()}.tmp"
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    gone = tmp_path / f".set.{finished.pid}.tmp"
    other = tmp_path / f".other.{finished.pid}.tmp"
    own = tmp_path / f".set.{os.getpid()}.tmp"
    for folder in (running, gone, other, own):
        folder.mkdir()
    remove_leftovers(tmp_path, "set")
    assert sorted(tmp_path.iterdir()) == sorted([running, other])


def test_leftovers_of_another_machine_stay_while_it_may_be_writing(tmp_path: Path) -> None:
    fresh, old, file = (tmp_path / f".set.elsewhere-{number}.tmp" for number in (1, 2, 3))
    for folder in (fresh, old):
        (folder / "sub").mkdir(parents=True)
    file.write_text("half")
    hours_ago = time.time() - 7200
    for path in (fresh, old / "sub", old, file):
        os.utime(path, (hours_ago, hours_ago))  # in `fresh`, something below it is newer
    assert remove_leftovers(tmp_path, "set") == [old, file]
    assert list(tmp_path.iterdir()) == [fresh]


def test_the_clock_of_this_machine_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is two hours ahead of the file system's."""
    live = tmp_path / ".set.elsewhere-1.tmp"
    live.mkdir()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    assert remove_leftovers(tmp_path, "set") == []
    assert list(tmp_path.iterdir()) == [live]


def test_what_its_writer_completes_while_it_is_removed_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / ".set.elsewhere-1.tmp"
    aside.mkdir()
    for number in range(5):
        (aside / str(number)).write_text("x")
    os.utime(aside, (0, 0))
    for file in aside.iterdir():
        os.utime(file, (0, 0))
    remove = shutil.rmtree

    def late(path: Path, **settings: Any) -> None:
        with suppress(FileNotFoundError):
            aside.rename(tmp_path / "set")
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", late)
    remove_leftovers(tmp_path, "set")
    assert not (tmp_path / "set").exists() or len(list((tmp_path / "set").iterdir())) == 5


def test_a_link_of_which_the_reply_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a network file system resends the request."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert create_file(tmp_path / "file", "mine")
    assert not create_file(tmp_path / "file", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_this_process_is_told_from_its_namesake_on_another_machine(tmp_path: Path) -> None:
    with new_folder(tmp_path / "set"):
        (aside,) = tmp_path.iterdir()
        assert aside == atomic.aside_path(tmp_path / "set")
        namesake = aside.with_name(aside.name.replace(".set.", ".set.not_"))
        namesake.mkdir()
        assert remove_leftovers(tmp_path, "set") == [aside]  # here only its own can be leftovers
        aside.mkdir()
    assert namesake.exists()


def test_a_new_file_is_not_written_over_an_old_one(tmp_path: Path) -> None:
    assert create_file(tmp_path / "file", "mine")
    assert not create_file(tmp_path / "file", "theirs")
    assert (tmp_path / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int = errno.EPERM) -> None:
    """Refuse hard links, as exFAT, FUSE or a network mount may."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_new_file_where_nothing_can_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse_links(monkeypatch, number)
    assert create_file(tmp_path / "file", "mine")
    assert not create_file(tmp_path / "file", "theirs")
    assert (tmp_path / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_disk_that_fails_is_not_taken_for_one_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        create_file(tmp_path / "file", "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other_succeeds", [True, False])
def test_without_links_a_second_writer_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_succeeds: bool
) -> None:
    """Another process holds the claim to create the file and creates it, or fails to, while this one waits."""
    refuse_links(monkeypatch)
    target, claim = tmp_path / "file", tmp_path / ".file.claim"
    claim.write_text("elsewhere-1")

    def other_goes_on(_: float) -> None:
        if other_succeeds:
            target.write_text("theirs")
        claim.unlink()

    monkeypatch.setattr(time, "sleep", other_goes_on)
    assert create_file(target, "mine") is not other_succeeds
    assert target.read_text() == ("theirs" if other_succeeds else "mine")
    assert list(tmp_path.iterdir()) == [target]


def test_without_links_a_killed_writer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch)
    monkeypatch.setattr(atomic, "_CLAIM_SECONDS", 0.0)
    claim = tmp_path / ".file.claim"
    claim.write_text("elsewhere-1")
    with pytest.raises(
        StorageError, match=r"process elsewhere-1 holds .*/\.file\.claim: remove that file if"
    ) as caught:
        create_file(tmp_path / "file", "mine")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [claim]
    claim.unlink()
    assert create_file(tmp_path / "file", "mine")


# All start once the last is ready; any process that reads the file meanwhile finds it complete.
RACE = """
import errno, os, sys
from pathlib import Path
from llavamod_offline.storage.atomic import create_file
def refuse(*_):
    raise OSError(errno.EPERM, "")
os.link = refuse
target, me = Path(sys.argv[1]), sys.argv[2] * 100_000
print("ready", flush=True)
for number in range(30):
    sys.stdin.readline()
    mine = create_file(target / str(number), me)
    there = (target / str(number)).read_text()
    print(int(mine), there[0], len(there), len(set(there)), flush=True)
"""


def test_without_links_one_of_several_writers_creates_a_file(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for name in "abc"
    ]
    pipes = [(writer.stdin, writer.stdout) for writer in writers]
    assert [said.readline() for _, said in pipes if said] == ["ready\n"] * 3
    for _ in range(30):
        for go, _ in pipes:
            assert go is not None
            go.write("\n")
        answers = [said.readline().split() for _, said in pipes if said]
        assert sorted(answer[0] for answer in answers) == ["0", "0", "1"]
        winner = "abc"["".join(answer[0] for answer in answers).index("1")]
        assert [answer[1:] for answer in answers] == [[winner, "100000", "1"]] * 3
    for writer in writers:
        writer.communicate()
    assert len(list(tmp_path.iterdir())) == 30


def test_a_folder_vanishes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before anything is deleted
        remove_folder(tmp_path / "set")
    assert not (tmp_path / "set").exists()
    remove_leftovers(tmp_path, "set")
    assert list(tmp_path.iterdir()) == []
