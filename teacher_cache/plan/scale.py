"""`cache-teacher plan --scale`: what a capture of many more samples takes, from the unit costs of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llavamod_offline.errors import ConfigError
from teacher_cache.plan.estimate import Plan

# Measured by `python -m tests.benchmarks.scale`, on one core: per shard, and per byte of the tables of sequences.
_OPEN_SECONDS, _OPEN_BYTES = 4.5e-5, 2_000
_TABLE_SECONDS = 1 / 400e6
_LAZY_BYTES = 2**30  # of tables; beyond this they are opened when they are read
_ROW_BYTES = 8  # of a training run's join, for each sample and role
_CLAIM_REQUESTS = 9  # a worker's requests per shard, besides those for its files
_BLOCK_BYTES = 2**30  # of decoded records, the most that a training run keeps


@dataclass(frozen=True)
class ScaledPlan:
    """What `samples` samples take. Bytes and seconds; hours are those of all machines together.

    `files`, `write_requests`: of the cache, and of the workers that write it to a bucket. `index_bytes`: cache.json;
    `table_bytes`: all tables of sequences. `join_seconds`: of a training run, which reads every table once.
    `training_memory`: of the join and of decoded records; `training_disk`: of a host that reads from a bucket.
    """

    samples: int
    shards: int
    sequences: int
    positions: int
    bytes: int
    files: int
    write_requests: int
    index_bytes: int
    table_bytes: int
    machine_hours: float
    gpu_hours: float | None
    open_seconds: float
    open_memory: int
    join_seconds: float
    training_memory: int
    training_disk: int


def parse_scale(text: str) -> list[int]:
    """Numbers of samples, such as "5e6,1e9". Errors: `ConfigError`."""
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not 1 <= number < 1e15:
            raise ConfigError(f"--scale: '{part}' is not a number of samples: write such as 5e6,1e9")
        found.append(round(number))
    return found


def scaled(plan: Plan, numbers: Sequence[int]) -> list[ScaledPlan]:
    """Scale a plan to other numbers of samples, in shards of the same size."""
    return [_scaled(plan, number) for number in numbers]


def _scaled(plan: Plan, samples: int) -> ScaledPlan:
    share = samples / plan.samples
    shards = math.ceil(plan.shards * share)
    sequences, tables = round(plan.sequences * share), round(plan.bytes.get("sequences", 0) * share)
    index = plan.index_bytes / plan.shards * shards
    size = round((plan.total_bytes - plan.index_bytes) * share + index)
    hours = (plan.seconds["capture"] + plan.seconds["write"]) * share / 3600
    open_tables = tables if tables <= _LAZY_BYTES else 0
    rows = _ROW_BYTES * sequences
    return ScaledPlan(
        samples=samples,
        shards=shards,
        sequences=sequences,
        positions=round(plan.positions * share),
        bytes=size,
        files=plan.shard_files * shards + 3,
        write_requests=(plan.shard_files + _CLAIM_REQUESTS) * shards,
        index_bytes=round(index),
        table_bytes=tables,
        machine_hours=hours,
        gpu_hours=None if plan.gpu_hours is None else hours * plan.gpus,
        open_seconds=round(_OPEN_SECONDS * shards + _TABLE_SECONDS * open_tables, 3),
        open_memory=_OPEN_BYTES * shards,
        join_seconds=round(_OPEN_SECONDS * shards + _TABLE_SECONDS * tables, 3),
        training_memory=_OPEN_BYTES * shards + rows + _BLOCK_BYTES,
        training_disk=size,
    )
