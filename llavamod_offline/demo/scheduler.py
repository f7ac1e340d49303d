"""Running commands that need one another's results, a few at a time."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import LlavaModError


@dataclass(frozen=True)
class Step:
    """A command, and the names of the steps that must have ended before it starts."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def typed(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.command)


class StepError(LlavaModError):
    """A step's command failed."""


def run_steps(
    steps: Sequence[Step],
    logs: Path,
    *,
    at_once: int,
    on_end: Callable[[Step, float], None] = lambda step, seconds: None,
) -> dict[str, float]:
    """Run all steps, at most `at_once` together, each with its share of the cores; give each one's seconds.

    Output goes to `logs/NAME.log`. Errors: `StepError` with the end of the log of the first step that fails; the steps
    then running are ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    running = _Running()
    seconds: dict[str, float] = {}
    waiting = longest_first(steps)
    futures: dict[Future[float], Step] = {}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or futures:
                ready = [step for step in waiting if all(need in seconds for need in step.needs)]
                for step in ready[: at_once - len(futures)]:
                    waiting.remove(step)
                    futures[pool.submit(_run, step, logs / f"{step.name}.log", environment, running)] = step
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    step = futures.pop(future)
                    seconds[step.name] = future.result()
                    on_end(step, seconds[step.name])
        except BaseException:
            running.end()
            raise
    return seconds


def longest_first(steps: Sequence[Step]) -> list[Step]:
    """Sort steps by the length of the longest chain that waits for them. Errors: `StepError` for a need unmet."""
    names = {step.name for step in steps}
    for step in steps:
        unmet = [need for need in step.needs if need not in names]
        if unmet:
            raise StepError(f"step '{step.name}' waits for '{unmet[0]}', which is no step")

    def chain(name: str) -> int:
        return 1 + max((chain(step.name) for step in steps if name in step.needs), default=0)

    return sorted(steps, key=lambda step: -chain(step.name))


class _Running:
    """The processes that run; none is started any more once they are ended."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._ended = False

    @contextmanager
    def started(self, name: str, command: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start a process. Errors: `StepError` after `end`."""
        with self._lock:
            if self._ended:
                raise StepError(f"step '{name}' was not started: another one had failed")
            process = self._processes[name] = subprocess.Popen(command, **settings)
        with process:
            yield process
        with self._lock:
            del self._processes[name]

    def end(self) -> None:
        """End all."""
        with self._lock:
            self._ended = True
            for process in self._processes.values():
                process.terminate()


def _run(step: Step, log: Path, environment: Mapping[str, str], running: _Running) -> float:
    started = time.monotonic()
    with log.open("wb") as stream:
        stream.write(f"$ {step.typed}\n".encode())
        stream.flush()
        command = [_executable(step.command[0]), *step.command[1:]]
        settings = {"stdout": stream, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": environment}
        with running.started(step.name, command, **settings) as process:
            status = process.wait()
    if status != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-15:]
        raise StepError(f"step '{step.name}' ended with status {status}; the end of {log}:\n" + "\n".join(last))
    return time.monotonic() - started


def _executable(name: str) -> str:
    """The console script beside this Python, wherever the shell would look for it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise StepError(f"the command '{name}' is not installed beside {sys.executable}: install the project again")
    return found
