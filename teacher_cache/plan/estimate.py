"""`cache-teacher plan`: estimate size and time of a capture from a short probe; afterwards, compare with the result.

A plan is kept in a file beside the cache, `.NAME.plan.jsonl`: its first line is the plan, and every run that finds the
file appends a line with its time and positions.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage import atomic
from llavamod_offline.storage.folders import is_url, local_path, open_folder
from teacher_cache.engines.registry import gpus_of
from teacher_cache.fingerprint import differences
from teacher_cache.format.manifest import CACHE_NAME
from teacher_cache.inspection.summary import bytes_by_part
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.write.store import begun_fingerprint

if TYPE_CHECKING:
    from teacher_cache.capture.summary import Summary
    from teacher_cache.config import CacheTeacherConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The estimated size and time of a capture; seconds are totals over all `jobs` slices.

    `positions_error`: relative standard error of `positions`, and so of bytes and time. `seconds`: of `prepare` (hashes
    the weights), `load`, `capture` and `write`. `bytes`: of each part. `gpu_hours`: None without a GPU.
    `presets`: the bytes of the whole cache with each preset unchanged, for the same capture.temperature. `shard_files`:
    of each of the `shards`; `index_bytes`: of cache.json; 0 in older plans.
    """

    output: str
    device: str
    jobs: int
    samples: int
    sequences: int
    positions: int
    positions_error: float
    rejected: int
    bytes: dict[str, int]
    seconds: dict[str, float]
    gpu_hours: float | None
    probe: dict[str, float]
    presets: dict[str, int]
    fingerprint: dict[str, Any]
    shards: int = 0
    shard_files: int = 0
    index_bytes: int = 0

    @property
    def gpus(self) -> float:
        """The GPUs that capture at a time, as planned; 0 without one."""
        return (self.gpu_hours or 0.0) * 3600 / max(sum(self.seconds.values()), 1e-9)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(self.bytes.values())

    @property
    def total_seconds(self) -> float:
        """Seconds of all jobs together."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Comparison:
    """A finished cache against its plan, which is None if none was kept.

    `runs_positions` and `runs_seconds`: totals over the recorded runs. `differences`: fingerprint fields in which
    plan and cache differ.
    """

    output: str
    planned: Plan | None
    sequences: int
    positions: int
    rejected: int
    bytes: dict[str, int]
    runs: int
    runs_positions: int
    runs_seconds: float
    differences: list[str]


def make_plan(config: CacheTeacherConfig, *, samples: int, seconds: float) -> Plan:
    """Probe up to `samples` samples for about `seconds` and scale the result up to the whole set.

    Errors: those that a run finds before it captures; `CacheError` if no sample of the probe could be captured.
    """
    from llavamod_offline.models.device import pick_device
    from teacher_cache.capture_setup import follow_template, prepare_capture
    from teacher_cache.plan.probe import preset_bytes, probe, whole_cache

    pick_device(config.device)
    started = time.perf_counter()
    job = prepare_capture(**follow_template(config.setup_values, begun_fingerprint(config.output)))
    prepared = time.perf_counter()
    _LOG.info("probe: up to %d of %d samples on %s", samples, len(job.samples), job.device)
    engine = job.load()
    loaded = time.perf_counter()
    run = probe(job, engine, samples=samples, batch_size=job.batch_size, seconds=seconds)
    total, jobs = len(job.samples), config.part[1]
    gpus = gpus_of(config.engine.kind, config.engine.vllm)
    share = total / run.samples
    positions, error = run.positions(total)
    whole = whole_cache(job, run.captured, run.samples)
    spent = {
        "prepare": (prepared - started) * jobs,
        "load": (loaded - prepared) * jobs,
        "capture": run.seconds * share,
        "write": whole.seconds,
    }
    return Plan(
        output=config.output,
        device=job.device,
        jobs=jobs,
        samples=total,
        sequences=round(len(run.captured) * share),
        positions=round(positions * share),
        positions_error=error,
        rejected=round(run.rejected * share),
        bytes=whole.parts,
        seconds={name: round(value, 3) for name, value in spent.items()},
        gpu_hours=sum(spent.values()) / 3600 * gpus if job.device.startswith("cuda") else None,
        probe={
            "samples": run.samples,
            "sequences": len(run.captured),
            "positions": positions,
            "seconds": round(run.seconds, 3),
        },
        presets=preset_bytes(job, engine, run, seconds=seconds / 4),
        fingerprint=job.fingerprint,
        shards=len(job.samples.shard_names),
        shard_files=whole.shard_files,
        index_bytes=whole.index_bytes,
    )


def compare(output: str, cache: TeacherCache, file: Path | None) -> Comparison:
    """Compare a finished cache with its plan. Errors: `ConfigError` if the plan's file cannot be read."""
    planned, runs = read_plan(file) if file is not None and file.exists() else (None, [])
    return Comparison(
        output=output,
        planned=planned,
        sequences=cache.totals["sequences"],
        positions=cache.positions,
        rejected=cache.totals["rejected"],
        bytes=bytes_by_part(cache),
        runs=len(runs),
        runs_positions=sum(run["positions"] for run in runs),
        runs_seconds=round(sum(run["seconds"] for run in runs), 3),
        differences=[]
        if planned is None
        else differences(planned.fingerprint, cache.fingerprint, names=("plan", "cache")),
    )


def finished_cache(output: str) -> TeacherCache | None:
    """The cache at `output` if it is complete, else None. Errors: `CacheError` if it is damaged."""
    return open_cache(output) if CACHE_NAME in open_folder(output).names() else None


def plan_file(output: str) -> Path | None:
    """Where the plan of an output is kept; None if the output is a URL."""
    if is_url(output):
        return None
    folder = local_path(output)
    return folder.with_name(f".{folder.name}.plan.jsonl")


def write_plan(file: Path, plan: Plan) -> None:
    """Write a plan, replacing an earlier one and its runs. Errors: `ConfigError` if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(file, json.dumps({"plan": dataclasses.asdict(plan)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{file}: cannot write the plan: {error.strerror or error}: choose another --file") from error


def record_run(file: Path | None, summary: Summary) -> None:
    """Append a run to the file of a plan, if that exists and the run captured anything."""
    if file is None or not file.exists() or not summary.sequences:
        return
    run = {"seconds": summary.seconds, "positions": summary.positions, "sequences": summary.sequences}
    try:  # a single write, since several jobs may append at once
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"run": run}) + "\n")
    except OSError as error:
        _LOG.warning("%s: cannot append this run: %s", file, error.strerror or error)


def read_plan(file: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """Read a plan and the runs since. Errors: `ConfigError` naming the file."""
    try:
        first, *others = [json.loads(line) for line in file.read_text().splitlines()]
        return Plan(**first["plan"]), [line["run"] for line in others]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a readable plan ({error}): delete it and plan again") from error
