"""Commands and Python files in processes of their own, for tests of signals, outputs and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def script(name: str) -> str:
    """The console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def in_two_processes(file: str, *arguments: object) -> str:
    """Run a Python file under torchrun in two processes; it must succeed. Return its output."""
    done = subprocess.run(
        [script("torchrun"), "--standalone", "--nproc-per-node", "2", file, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a console script with one thread, in its own session, as a terminal would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(
        [script(command[0]), *command[1:]],
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=heed_signals,
        **{**given, **options},
    )


def heed_signals() -> None:
    """Reset signals as in a terminal; background jobs ignore SIGINT, and commands under `nohup` ignore SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `reached` returns true or the process has ended."""
    while not reached() and process.poll() is None:
        time.sleep(0.002)


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process handles a signal."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def has_loaded(process: subprocess.Popen[str], library: str) -> bool:
    """Whether the process has loaded a shared library."""
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False
