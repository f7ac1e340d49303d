"""Run commands that depend on one another, a few at a time.

Not `graphlib`, which does not put the longest chain first; doing so keeps two cores busy to the end.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.demo.launcher import Launcher
from llavamod_offline.errors import LlavaModError

_LAUNCHER_LOG = "launcher.log"
_POLL_SECONDS = 0.05
REJECTED_STATUS = 3
# For glibc: else each training step of a small model maps its tensors' memory anew, a tenth of its time.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclass(frozen=True)
class Step:
    """A command, and the names of the steps that must finish before it starts.

    `may_reject`: status 3, by which `cache-teacher` says that it rejected samples, is not a failure. `group`: steps of
    a lower group start before others that are ready.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    may_reject: bool = False
    group: int = 0

    @property
    def typed(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(self.command)


class StepError(LlavaModError):
    """A step's command failed."""


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    *,
    at_once: int,
    logs: Path | None = None,
    on_start: Callable[[Step], None] = lambda step: None,
    on_end: Callable[[Step, float], None] = lambda step, seconds: None,
    done: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Run all steps in `folder`, at most `at_once` at a time, each with its share of the cores; return their seconds.

    `done`: the seconds of steps that ended earlier and are not run again. Output goes to NAME.log in `logs`, by default
    the folder `logs` in `folder`. Errors: `StepError` with the end of the log of the first step that fails; running
    steps are terminated.
    """
    logs = logs or folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {**_KEEP_MEMORY, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    seconds: dict[str, float] = dict(done or {})
    waiting = [step for step in longest_first(steps) if step.name not in seconds]
    idle: list[Launcher] = []
    running: dict[Step, tuple[Launcher, float]] = {}
    try:
        while waiting or running:
            ready = [step for step in waiting if seconds.keys() >= set(step.needs)]
            for step in ready[: at_once - len(running)]:
                waiting.remove(step)
                while idle and not idle[-1].is_alive:
                    idle.pop().close()
                launcher = idle.pop() if idle else Launcher(environment, logs / _LAUNCHER_LOG)
                on_start(step)
                _start(step, launcher, folder, logs / f"{step.name}.log")
                running[step] = (launcher, time.monotonic())
            time.sleep(_POLL_SECONDS)
            for step, (launcher, started) in list(running.items()):
                status = launcher.poll()
                if status is not None:
                    del running[step]
                    idle.append(launcher)
                    _check(step, status, logs / f"{step.name}.log")
                    seconds[step.name] = time.monotonic() - started
                    on_end(step, seconds[step.name])
    finally:
        launchers = [*idle, *(launcher for launcher, _ in running.values())]
        for launcher in launchers:
            launcher.stop()
        for launcher in launchers:
            launcher.close()
        if launchers and not (logs / _LAUNCHER_LOG).stat().st_size:
            (logs / _LAUNCHER_LOG).unlink()
    return seconds


def longest_first(steps: Sequence[Step]) -> list[Step]:
    """Sort steps by group, then by the longest chain of steps that depends on each.

    Errors: `StepError` for an unmet need.
    """
    names = {step.name for step in steps}
    for step in steps:
        unmet = [need for need in step.needs if need not in names]
        if unmet:
            raise StepError(f"step '{step.name}' waits for '{unmet[0]}', which does not exist")

    def chain(name: str) -> int:
        return 1 + max((chain(step.name) for step in steps if name in step.needs), default=0)

    return sorted(steps, key=lambda step: (step.group, -chain(step.name)))


def _start(step: Step, launcher: Launcher, folder: Path, log: Path) -> None:
    log.write_text(f"$ {step.typed}\n")
    launcher.start(step.command, folder, log)


def _check(step: Step, status: int, log: Path) -> None:
    if status != 0 and not (step.may_reject and status == REJECTED_STATUS):
        last = log.read_text(errors="replace").strip().splitlines()[-15:]
        raise StepError(f"step '{step.name}' ended with status {status}; the end of {log}:\n" + "\n".join(last))
