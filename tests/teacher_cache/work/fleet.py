"""Workers on one output that are killed and stopped at random, with clocks that disagree, until the cache is complete.

Each worker is the console script in a process of its own; SHIFT_VARIABLE shifts its `time.time` by that many seconds.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.scripts import Script, fork_script

SHIFT_VARIABLE = "LLAVAMOD_TEST_CLOCK_SHIFT"
LIMIT_NAME = "limit"
WORKERS = 4
_SHIFT_SECONDS = 300.0
_SLACK = 2  # shards that workers may capture beyond the point at which the next kill is due
_POLL_SECONDS = 0.02
_FINE = (0, 4, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)


@dataclass
class FleetRun:
    """The outcome for one output: the digest, the signals sent, and how often each shard was begun and captured."""

    digest: str = ""
    signals: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    begun: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """How many workers were killed or stopped."""
        return self.signals.total()


def run_fleet(
    command: list[str],
    folder: Path,
    *,
    shards: int,
    kills: int,
    pause: float,
    lease_seconds: float,
    seed: int,
    variables: Mapping[str, str] | None = None,
) -> FleetRun:
    """Keep four workers running until one completes the cache; kill one of them at random, `kills` times in all.

    The kills are spread over progress, not time, so that each happens whatever the speed of the machine: one is due
    whenever another `shards / (kills + 1)` shards have been captured. It comes up to `pause` seconds later; workers
    that get too far ahead meanwhile wait for it.
    """
    rng, made = random.Random(seed), FleetRun()
    folder.mkdir(parents=True, exist_ok=True)
    log, numbers, began = folder / "shards.log", itertools.count(), time.monotonic()
    log.touch()
    due = [shards * number // (kills + 1) for number in range(1, kills + 1)]
    limit = folder / LIMIT_NAME

    def allow() -> None:
        """Tell the workers how many shards they may capture before the next kill."""
        rest = due[made.kills :]
        limit.with_suffix(".new").write_text(str(min(rest[0] + _SLACK, shards - 1) if rest else shards + 1))
        limit.with_suffix(".new").replace(limit)

    allow()

    def start() -> Script:
        shift = rng.uniform(-_SHIFT_SECONDS, _SHIFT_SECONDS)
        grace = rng.choice(["0", "0.05", "5"])
        prepare = functools.partial(_prepare, {**(variables or {}), SHIFT_VARIABLE: f"{shift:.0f}"}, log)
        place = folder / f"worker-{next(numbers)}"
        place.mkdir()
        (place / "stderr").touch()  # it may be killed before it makes one
        own = [*command, "--lease", f"{lease_seconds:g}", "--grace", grace, "--json"]
        return fork_script(own, place, before=prepare)

    workers = [start() for _ in range(WORKERS)]
    while not made.digest:
        time.sleep(_POLL_SECONDS)
        if made.kills < kills and _captured(log) >= due[made.kills]:
            time.sleep(rng.uniform(0, pause))
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            rng.choice(workers).send(number)
            made.signals[number.name] += 1
            allow()
        for place, worker in enumerate(workers):
            if worker.process.exitcode is None:
                continue
            status, stderr = worker.ended()
            made.statuses[status] += 1
            assert status in _FINE, stderr
            assert "Traceback" not in stderr, stderr
            if status == 0:
                made.digest = json.loads(worker.stdout.read_text().splitlines()[-1])["digest"]
            else:
                workers[place] = start()
    for worker in workers:
        status, stderr = worker.ended()
        assert status in _FINE, stderr
    for line in log.read_text().splitlines():
        event, _, shard = line.partition(" ")
        (made.begun if event == "begin" else made.captured)[shard] += 1
    made.seconds = time.monotonic() - began
    return made


def _captured(log: Path) -> int:
    """The number of distinct shards captured according to the log."""
    return len({line for line in log.read_text().splitlines() if line.startswith("captured ")})


def _prepare(variables: Mapping[str, str], log: Path) -> None:
    """Shift this process's clock, log each shard that it begins and captures, and begin none beyond the limit."""
    os.environ.update(variables)
    clock, shift = time.time, float(os.environ[SHIFT_VARIABLE])
    time.time = lambda: clock() + shift

    from teacher_cache.capture import pipeline
    from teacher_cache.capture.shard import capture_prepared

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)

    def logged(setup, engine, prepared, progress):  # type: ignore[no-untyped-def]
        while _captured(log) >= int((log.parent / LIMIT_NAME).read_text()):
            time.sleep(_POLL_SECONDS)
        name = prepared.order and setup.samples.shard_names[_shard_of(setup, next(iter(prepared.order))[0])]
        os.write(descriptor, f"begin {name}\n".encode())
        done = capture_prepared(setup, engine, prepared, progress)
        os.write(descriptor, f"captured {name}\n".encode())
        return done

    setattr(pipeline, "capture_prepared", logged)  # noqa: B010


def _shard_of(setup, key: str) -> int:  # type: ignore[no-untyped-def]
    row = setup.samples.row_of(key)
    names = setup.samples.shard_names
    return next(number for number, name in enumerate(names) if row in setup.samples.rows_of(name))
