"""Start commands in forks of a process that has already imported the large libraries, which takes seconds each time.

A launcher runs one command after another. It reads each order as a line of JSON, and answers with the command's process
id, then with its exit status. Commands that are not this project's are exec'd instead, and so are all commands if there
is an accelerator, whose driver does not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from llavamod_offline.signals import starting_processes

_PACKAGE = "llavamod-offline"
_LIBRARIES = ("train.run", "train.measure", "eval.generate", "eval.engines.hf", "teacher_cache.capture.run")
_NOT_FOUND_STATUS = 127
_PR_SET_PDEATHSIG = 1


class Launcher:
    """A launcher, and the command that it runs; `log` takes the launcher's own output."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as stream, starting_processes():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                bufsize=0,
                env={**os.environ, **environment},
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._command: int | None = None  # its process id

    @property
    def is_alive(self) -> bool:
        """Whether it still takes commands; the system may have killed it, for example when memory ran out."""
        return self._process.poll() is None

    def start(self, command: Sequence[str], folder: Path, log: Path) -> None:
        """Start a command in `folder`; what it prints is added to `log`."""
        order = {"command": list(command), "folder": str(folder.absolute()), "log": str(log.absolute())}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def poll(self, *, wait: bool = False) -> int | None:
        """The exit status of the last command started, negative for a signal; None while it runs."""
        stream = self._process.stdout
        assert stream is not None
        while wait or select.select([stream], [], [], 0)[0]:
            what, _, number = stream.readline().decode().partition(" ")
            if what != "began":
                self._command = None
                return int(number) if what == "ended" else -signal.SIGKILL  # the launcher itself is gone
            self._command = int(number)
        return None

    def stop(self) -> None:
        """Ask the command to end, if one runs; a launcher without one ends itself."""
        if self.poll() is None and self._command is not None:
            os.kill(self._command, signal.SIGTERM)
        else:
            self._process.terminate()

    def close(self) -> None:
        """Wait for the end of the command, and end the launcher."""
        while self._command is not None:
            self.poll(wait=True)
        self._process.terminate()
        self._process.communicate()


def main() -> None:
    """Run the commands ordered on stdin, one after another, until it ends."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is not a reply
    own = _own_commands()
    importing, survives = True, False
    for line in sys.stdin:
        order = json.loads(line)
        name = order["command"][0]
        if name in own and importing:
            importing, survives = False, _import_libraries()
        launcher = os.getpid()
        child = os.fork()
        if child == 0:
            replies.close()
            _become(order, own[name] if name in own and survives else None, launcher)
        replies.write(b"began %d\n" % child)
        _, status = os.waitpid(child, 0)
        replies.write(b"ended %d\n" % os.waitstatus_to_exitcode(status))


def _own_commands() -> dict[str, importlib.metadata.EntryPoint]:
    """This project's console scripts, by name; none if it is not installed."""
    try:
        points = importlib.metadata.distribution(_PACKAGE).entry_points
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {point.name: point for point in points if point.group == "console_scripts"}


def _import_libraries() -> bool:
    """Import what most commands import; return whether forks can use it."""
    for name in _LIBRARIES:
        with suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    gc.freeze()  # otherwise garbage collection in a fork copies the memory of everything imported
    if sys.platform != "linux" or "torch" not in sys.modules:
        return False
    import torch

    return not torch.accelerator.is_available()


def _become(order: Mapping[str, Any], own: importlib.metadata.EntryPoint | None, launcher: int) -> NoReturn:
    """Run a command in this process, which was forked for it."""
    if sys.platform == "linux":
        _end_with_parent()
        if os.getppid() != launcher:
            signal.raise_signal(signal.SIGTERM)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, target)
    os.chdir(order["folder"])
    command = order["command"]
    if own is None:
        os.execv(_executable(command[0]), command)
    sys.stdin, sys.argv = os.fdopen(0, encoding="utf-8"), command
    sys.exit(own.load()())


def _executable(name: str) -> str:
    """The console script beside this Python, wherever the shell would look for it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        print(f"the command '{name}' is not installed beside {sys.executable}: reinstall the project", file=sys.stderr)
        sys.exit(_NOT_FOUND_STATUS)
    return found


def _end_with_parent() -> None:
    """Have the kernel terminate this process when its parent dies, even by SIGKILL: a rerun replaces what it writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
