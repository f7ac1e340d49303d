"""`cache-teacher plan`: what a capture will come to, from a short probe; afterwards, the plan against the fact.

A plan is kept in a file beside the cache (`.NAME.plan.jsonl`; nothing undeclared lies in a cache): its first line is
the plan, and every run that finds the file adds a line with what it took.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage import atomic
from llavamod_offline.storage.folders import is_url, open_folder
from teacher_cache.fingerprint import differences
from teacher_cache.format.manifest import CACHE_NAME
from teacher_cache.inspection.summary import bytes_by_part
from teacher_cache.plan.probe import Lengths, Parts, all_padded_tokens, measure, measure_lengths, measure_presets
from teacher_cache.read.reader import TeacherCache, open_cache

if TYPE_CHECKING:
    from llavamod_offline.data.sets.sample_set import SampleSet
    from teacher_cache.capture.run import Summary
    from teacher_cache.config import CacheTeacherConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a capture will come to. Seconds are of all jobs together, if the set is captured in `jobs` slices.

    `positions_error`: relative standard error of `positions`, and so of bytes and time. `seconds` of `prepare` (weights
    hashed), `load`, `capture` and `write`; `bytes` of each part. `gpu_hours` is None where the device is no GPU.
    `presets`: the bytes of the whole cache with each preset as it is, at the same temperatures and forced tokens.
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

    `runs_positions`: what the recorded runs captured; `runs_seconds`: what they took. `differences`: what the cache was
    made with that the plan was not.
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

    Errors: those of a run that can be known before it; `CacheError` if no sample of the probe could be captured.
    """
    from teacher_cache.capture_setup import prepare_capture
    from teacher_cache.engines import load_engine

    started = time.perf_counter()
    job = prepare_capture(config)
    prepared = time.perf_counter()
    _LOG.info("probe: up to %d of %d samples on %s", samples, len(job.samples), job.device)
    lengths = measure_lengths(job, samples, seconds=seconds)
    tokenised = time.perf_counter()
    engine = load_engine(job, config)
    loaded = time.perf_counter()
    found = measure(job, engine, lengths, samples=samples, batch_size=config.batch_size, seconds=seconds)
    limits: dict[str, Any] = {"batch_size": config.batch_size, "seconds": seconds / 4}
    presets = measure_presets(job, engine, lengths, samples=samples, **limits)
    jobs = config.part[1]
    shards = len(job.samples.shard_names)
    total = len(job.samples)
    share = total / len(lengths.rows_N)
    positions, error = estimate_total(job.samples, lengths)
    refused = lengths.rejected_N.sum() * share + found.rejected / found.samples * total
    sequences = (lengths.sequences_N + lengths.rejected_N).sum() * share - refused
    spent = {
        "prepare": (prepared - started) * jobs,
        "load": (loaded - tokenised) * jobs,
        "capture": found.token_seconds * all_padded_tokens(lengths, config.batch_size) * share,
        "write": found.write_seconds[0] * shards + found.write_seconds[1] * positions,
    }
    return Plan(
        output=config.output,
        device=job.device,
        jobs=jobs,
        samples=total,
        sequences=round(sequences),
        positions=round(positions),
        positions_error=error,
        rejected=round(refused),
        bytes=_scaled_bytes(found.parts, found.cache_bytes, positions, sequences, shards),
        seconds={name: round(value, 3) for name, value in spent.items()},
        gpu_hours=sum(spent.values()) / 3600 if job.device.startswith("cuda") else None,
        probe={
            "samples": found.samples,
            "tokenised": len(lengths.rows_N),
            "sequences": found.sequences,
            "positions": found.positions,
            "seconds": round(found.seconds, 3),
        },
        presets={
            name: sum(_scaled_bytes(parts, found.cache_bytes, positions, sequences, shards).values())
            for name, parts in presets.items()
        },
        fingerprint=job.fingerprint,
    )


def estimate_total(samples: SampleSet, lengths: Lengths) -> tuple[float, float]:
    """Positions of the whole set, and their relative standard error, by regression on the length of the text.

    The regression estimator of survey sampling: ȳ + b (x̄_all − x̄), with y the positions of the probe's samples and x
    the characters of text, which the index knows of every sample. Cochran, Sampling Techniques, ch. 7.
    """
    text = samples.index.column("text_length").to_numpy().astype(np.float64)
    x_N, y_N = text[lengths.rows_N], lengths.positions_N.astype(np.float64)
    slope = _slope(x_N, y_N)
    mean = float(y_N.mean() + slope * (text.mean() - x_N.mean()))
    left_N = y_N - y_N.mean() - slope * (x_N - x_N.mean())
    count, total = len(x_N), len(samples)
    if count == total:
        return float(y_N.sum()), 0.0
    spread = float(np.square(left_N).sum()) / max(count - 2, 1)
    error = math.sqrt(spread / count * (1 - count / total))
    return max(mean, 0.0) * total, error / mean if mean > 0 else 0.0


def compare(output: str, cache: TeacherCache, file: Path | None) -> Comparison:
    """Put a finished cache beside its plan. Errors: `ConfigError` if the plan's file cannot be read."""
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
    """Where the plan of an output is kept; None for an output that is no local folder."""
    if is_url(output):
        return None
    folder = Path(output)
    return folder.with_name(f".{folder.name}.plan.jsonl")


def write_plan(file: Path, plan: Plan) -> None:
    """Keep a plan, in place of an earlier one and its runs. Errors: `ConfigError` if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(file, json.dumps({"plan": dataclasses.asdict(plan)}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{file}: the plan cannot be kept: {error.strerror or error}: name a --file") from error


def record_run(file: Path | None, summary: Summary) -> None:
    """Add what a run took to a plan that is kept; a run that captured nothing is no news."""
    if file is None or not file.exists() or not summary.sequences:
        return
    run = {"seconds": summary.seconds, "positions": summary.positions, "sequences": summary.sequences}
    try:  # one write at the end of the file: several jobs may do so at once
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"run": run}) + "\n")
    except OSError as error:
        _LOG.warning("%s: what this run took cannot be added: %s", file, error.strerror or error)


def read_plan(file: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """A kept plan and the runs since. Errors: `ConfigError` naming the file."""
    try:
        first, *others = [json.loads(line) for line in file.read_text().splitlines()]
        return Plan(**first["plan"]), [line["run"] for line in others]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: no plan that can be read ({error}): remove it, and plan again") from error


def _scaled_bytes(costs: Parts, cache_bytes: int, positions: float, sequences: float, shards: int) -> dict[str, int]:
    """Every part has a cost a shard and a cost a position (or sequence)."""
    units = {"sequences": sequences}
    parts = {name: fixed * shards + each * units.get(name, positions) for name, (fixed, each) in costs.items()}
    parts["metadata"] += cache_bytes
    return {name: round(size) for name, size in sorted(parts.items(), key=lambda item: -item[1])}


def _slope(x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> float:
    spread = float(np.square(x_N - x_N.mean()).sum())
    return float(((x_N - x_N.mean()) * (y_N - y_N.mean())).sum()) / spread if spread else 0.0
