"""Commands in forks of one process print and return what they do when run alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llavamod_offline.demo.launcher import Launcher


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    found = Launcher({"GREETING": "hello"}, tmp_path / "launcher.log")
    yield found
    found.stop()
    found.close()
    assert (tmp_path / "launcher.log").read_text() == ""


def run(launcher: Launcher, folder: Path, *command: str) -> tuple[int | None, str]:
    """Run a command; return its status and output."""
    log = folder / "command.log"
    log.touch()
    launcher.start(command, folder, log)
    status = launcher.poll(wait=True)
    printed = log.read_text()
    log.unlink()
    return status, printed


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 120
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return file.read_text()


def ends(process: int) -> bool:
    """Whether a process that is not our child ends within minutes; a zombie counts as ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            state = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_other_commands_are_executed(launcher: Launcher, tmp_path: Path) -> None:
    """They run in the folder, with the environment, without input, and their exit status is returned."""
    code = "import os, sys; print(os.getcwd(), os.environ['GREETING'], repr(sys.stdin.read())); sys.exit(3)"
    assert run(launcher, tmp_path, *python(code)) == (3, f"{tmp_path} hello ''\n")
    killed = "import os; os.kill(os.getpid(), 9)"
    assert run(launcher, tmp_path, *python(killed)) == (-signal.SIGKILL, "")
    status, printed = run(launcher, tmp_path, "no-such-command")
    assert status == 127
    assert "'no-such-command' is not installed" in printed


@pytest.mark.slow
def test_own_commands_print_what_they_print_alone(launcher: Launcher, tmp_path: Path) -> None:
    """One after another: none sees state that another left in the process."""
    for command in (
        ("train-student", "sft", "nonsense=1"),
        ("llavamod-offline", "--version"),
        ("eval-student", "generate", "model=nowhere", "root=.", "output=out", "tasks=[pope]"),
        ("train-student", "sft", "nonsense=1"),
    ):
        log = tmp_path / "alone.log"
        with log.open("wb") as stream:
            script = Path(sys.executable).parent / command[0]
            alone = subprocess.run([script, *command[1:]], cwd=tmp_path, stdout=stream, stderr=stream, check=False)
        assert run(launcher, tmp_path, *command) == (alone.returncode, log.read_text())


@pytest.mark.slow
def test_own_commands_are_forks(tmp_path: Path) -> None:
    """They start no new interpreter, which would run `sitecustomize`."""
    import torch

    if torch.accelerator.is_available():
        pytest.skip("commands are executed where there is an accelerator")
    begun = tmp_path / "begun"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(begun)!r}, 'a').write('x')")
    launcher = Launcher({"PYTHONPATH": str(tmp_path)}, tmp_path / "launcher.log")
    for expected in ("x", "x"):
        assert run(launcher, tmp_path, "llavamod-offline", "--version")[0] == 0
        assert begun.read_text() == expected
    run(launcher, tmp_path, *python(""))
    assert begun.read_text() == "xx"
    launcher.stop()
    launcher.close()


def test_closing_ends_a_command(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    launcher = Launcher({}, tmp_path / "launcher.log")
    (tmp_path / "log").touch()
    launcher.start(python(code), tmp_path, tmp_path / "log")
    process = int(wait_for(begun))
    assert launcher.poll() is None
    launcher.stop()
    launcher.close()
    assert not Path("/proc", str(process)).exists()


@pytest.mark.parametrize("victim", ["launcher", "owner"])
def test_a_command_does_not_outlive_those_who_started_it(tmp_path: Path, victim: str) -> None:
    """Those are killed, so they cannot end the command themselves."""
    begun = tmp_path / "begun"
    command = python(
        f"import os, time; open({str(begun)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}'); time.sleep(3600)"
    )
    (tmp_path / "log").touch()
    owner = subprocess.Popen(
        python(
            "from pathlib import Path\nfrom llavamod_offline.demo.launcher import Launcher\n"
            f"launcher = Launcher({{}}, Path({str(tmp_path / 'launcher.log')!r}))\n"
            f"launcher.start({command!r}, Path({str(tmp_path)!r}), Path({str(tmp_path / 'log')!r}))\n"
            "print(launcher.poll(wait=True))\n"
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    process, parent = map(int, wait_for(begun).split())
    os.kill(parent if victim == "launcher" else owner.pid, signal.SIGKILL)
    printed, _ = owner.communicate()
    assert printed == (f"{-signal.SIGKILL}\n" if victim == "launcher" else "")
    assert ends(process)
    assert ends(parent)
