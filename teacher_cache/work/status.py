"""`cache-teacher status`: the progress of a cache, by reading its store alone, from any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.folders import Folder, open_folder
from teacher_cache.format.manifest import CACHE_NAME, JOB_NAME, SHARDS_NAME, read_object
from teacher_cache.plan.estimate import Plan, plan_file, read_plan
from teacher_cache.read.cache_file import check_folder
from teacher_cache.work.claims import ShardHistory, histories, read_endings
from teacher_cache.work.heartbeat import WorkerState, all_workers, read_workers
from teacher_cache.work.journal import DoneShard, read_counts, read_journals
from teacher_cache.write.store import committed_shards

_REPAIR = "run `cache-teacher verify --repair`"
_LOOK_SHARE = 1.3  # of the pause between renewals
_LOOK_SECONDS = 65.0


@dataclass(frozen=True)
class WorkerLine:
    """One worker, as it was last seen. `renewed`: whether it was renewed while we looked; False if it has ended.

    `waiting_share`: the share of its teacher's time that was spent waiting; None before it ran.
    """

    worker: str
    host: str
    state: str
    renewed: bool
    holds: list[str]
    shards: int
    positions: int
    positions_per_second: float
    hours: float
    gpu_hours: float
    waiting_share: float | None


@dataclass(frozen=True)
class FailedShard:
    """A shard that failed: how often, where last and why; `given_up`: not tried again before `retry`."""

    shard: str
    attempts: int
    host: str
    reason: str
    given_up: bool


@dataclass(frozen=True)
class Status:
    """The progress of a cache. `claimed` names each claimed shard's worker; `failed` counts the shards given up.

    `positions_per_second`: of all workers that renew, None without one. `seconds_left`: at that rate. `machine_hours`,
    `gpu_hours`: of all workers so far; `waiting_share`: of their teachers' time. `planned`: of the plan beside the
    output, if there is one.
    """

    output: str
    complete: bool
    shards: int
    done: int
    claimed: dict[str, str]
    failed: int
    sequences: int
    positions: int
    rejected: int
    bytes: int
    positions_per_second: float | None
    seconds_left: float | None
    machine_hours: float
    gpu_hours: float
    waiting_share: float | None
    planned: dict[str, float | None] | None
    workers: list[WorkerLine]
    failures: list[FailedShard]


def read_status(where: str, *, plan: Path | None = None, pause: Callable[[float], None] = time.sleep) -> Status:
    """Read the progress of a cache; looks at workers twice, to see which renew: about a ninth of the longest lease
    apart, at most 65 s.

    `plan`: another file than the one beside the output.
    Errors: `CacheError` if there is no cache; `StorageError`.
    """
    folder = open_folder(where)
    names, complete = _shard_names(folder)
    states = _workers(folder, pause)
    there = histories(folder)
    done = _done(folder, names, complete)
    left = {name: there[name] for name in names if name in there and name not in done}
    read_endings(folder, left)
    attempts = max((state.attempts for state, _ in states), default=1)
    live = {state.worker for state, renewed in states if renewed}
    held = {shard: state.worker for state, _ in states if not state.has_ended for shard in state.holds if shard in left}
    silent = {state.worker for state, renewed in states if not renewed}
    failures = [
        _failure(name, history, attempts, dead=history.is_held and held.get(name) in silent | {None})
        for name, history in left.items()
        if history.failures or history.latest > len(history.given_up)
    ]
    failures = [item for item in failures if item.attempts]
    failures = [item for item in failures if item.given_up or item.shard not in held]
    failed = sum(item.given_up for item in failures)
    lines = [_line(state, renewed) for state, renewed in states]
    rate = sum(line.positions_per_second for line in lines if line.renewed and line.state == "capturing")
    counts = DoneShard(*(sum(column) for column in zip(*done.values(), strict=True))) if done else DoneShard(0, 0, 0, 0)
    planned = _plan(where, plan)
    total = planned.positions if planned else counts.positions / len(done) * len(names) if done else None
    return Status(
        output=where,
        complete=complete,
        shards=len(names),
        done=len(done),
        claimed={shard: worker for shard, worker in held.items() if worker in live},
        failed=failed,
        sequences=counts.sequences,
        positions=counts.positions,
        rejected=counts.rejected,
        bytes=counts.bytes,
        positions_per_second=round(rate, 1) if live else None,
        seconds_left=round(max(total - counts.positions, 0) / rate, 1) if rate and total is not None else None,
        machine_hours=sum(line.hours for line in lines),
        gpu_hours=sum(line.gpu_hours for line in lines),
        waiting_share=_waiting_share(*(state for state, _ in states)),
        planned=_planned(planned) if planned else None,
        workers=lines,
        failures=failures,
    )


def _shard_names(folder: Folder) -> tuple[list[str], bool]:
    """The shards of a cache, and whether it is complete."""
    check_folder(folder)
    names = folder.names()
    if JOB_NAME not in names:
        raise CacheError(f"cache '{folder.where}': {JOB_NAME} is missing, so it is not a cache: check the path")
    return list(read_object(folder, JOB_NAME, way_out=_REPAIR)["shards"]), CACHE_NAME in names


def _done(folder: Folder, names: list[str], complete: bool) -> dict[str, DoneShard]:
    """The counts of each committed shard."""
    if complete:
        shards = read_object(folder, CACHE_NAME, way_out=_REPAIR)["shards"]
        return {item["name"]: DoneShard(*(int(item[field]) for field in DoneShard._fields)) for item in shards}
    begun = folder.names(SHARDS_NAME)
    journal = read_journals(folder)
    done = {name: journal[name] for name in names if name in journal and name in begun}
    others = [name for name in names if name in begun and name not in done]
    committed = sorted(committed_shards(folder, others))
    return done | dict(zip(committed, read_counts(folder, committed), strict=True))


def _workers(folder: Folder, pause: Callable[[float], None]) -> list[tuple[WorkerState, bool]]:
    """All workers that the output has had, and whether each is renewed."""
    names = all_workers(folder)
    first = {state.worker: state for state in read_workers(folder, names) if state}
    open_ones = [state for state in first.values() if not state.has_ended]
    if open_ones:
        pause(min(max(state.renew_seconds for state in open_ones) * _LOOK_SHARE, _LOOK_SECONDS))
    again = {state.worker: state for state in read_workers(folder, [state.worker for state in open_ones]) if state}
    return [
        (again.get(name, state), not again.get(name, state).has_ended and again.get(name, state) != state)
        for name, state in first.items()
    ]


def _line(state: WorkerState, renewed: bool) -> WorkerLine:
    hours = state.seconds / 3600
    return WorkerLine(
        worker=state.worker,
        host=str(state.owner.get("host", "")),
        state=state.state if renewed or state.has_ended else "silent",
        renewed=renewed,
        holds=state.holds,
        shards=state.shards,
        positions=state.positions,
        positions_per_second=round(state.positions / state.capturing_seconds, 1) if state.capturing_seconds else 0.0,
        hours=hours,
        gpu_hours=hours * state.gpus,
        waiting_share=_waiting_share(state),
    )


def _waiting_share(*states: WorkerState) -> float | None:
    seconds = sum(state.capturing_seconds for state in states)
    return round(sum(state.waited_seconds for state in states) / seconds, 4) if seconds else None


def _failure(name: str, history: ShardHistory, attempts: int, *, dead: bool) -> FailedShard:
    """A shard that failed, or whose workers died; `dead`: whether the last one died too."""
    count = history.attempts(dead=dead)
    given_up = count >= attempts and (dead or not history.is_held)
    if not history.failures:
        return FailedShard(name, count, "", f"{history.latest} workers died while they captured it", given_up)
    last = history.failures[-1]
    return FailedShard(name, count, last.host, last.reason, given_up)


def _plan(where: str, file: Path | None) -> Plan | None:
    file = file or plan_file(where)
    return read_plan(file)[0] if file is not None and file.exists() else None


def _planned(plan: Plan) -> dict[str, float | None]:
    return {
        "positions": plan.positions,
        "bytes": plan.total_bytes,
        "seconds": plan.total_seconds,
        "gpu_hours": plan.gpu_hours,
    }
