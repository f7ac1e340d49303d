"""A cache of 100,000 shards and 10⁹ sequences: opening it, its status, verifying one shard, and the first batch.

    python -m tests.benchmarks.scale [--quick] --json FILE

One shard of 10,000 sequences is really written. The cache is built from its manifest: cache.json lists it 100,000 times
under as many names, and its files are linked into the folders of a few of them. The unfinished cache, whose `status` is
read, has all 100,000 folders and the lists of 40 workers. Each measurement runs in a process of its own.

`open_seconds_100k_shards`, `open_mb_100k_shards` (growth of the resident memory): `open_cache`.
`first_batch_seconds_100k_shards`: opening, looking up one shard's keys, and decoding 64 of its sequences.
`status_seconds_100k_shards`: reading the status of the unfinished cache, whose workers have ended.
`verify_shard_seconds`: verifying one shard's checksums and records. `shard_rows_seconds`: opening and checking the
table of one more shard, on average; a training run that joins a set with the cache does this for every shard.
`tail_profile_seconds`: reading the mean tail of one shard; a training run whose loss needs it reads every shard's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from teacher_cache.format.manifest import (
    CACHE_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SHARDS_NAME,
    cache_content,
    canonical,
    content_entry,
    job_content,
    shard_entry,
)
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.read.cache_tail_profile import tail_sums
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.shard_check import ShardCheck
from teacher_cache.work.heartbeat import Heartbeat
from teacher_cache.work.journal import DoneShard, Journal
from teacher_cache.work.status import read_status
from teacher_cache.write.store import CacheStore
from tests.benchmarks.form import finish, parse_arguments, reset_peak, resident_bytes
from tests.benchmarks.store import CODEC, FINGERPRINT, VOCABULARY, make_records

NAME = "scale"
SHARDS, QUICK_SHARDS = 100_000, 2_000
SEQUENCES = 10_000
WORKERS = 40
BATCH = 64
REAL = 32  # shards whose files exist


def make_sequences(count: int) -> list[SequenceRecord]:
    """The shard's sequences, of one to three positions each."""
    lengths = np.random.default_rng(0).integers(1, 4, count)
    pieces = make_records(int(lengths.sum()), 0).split(lengths.tolist())
    digest = "cd" * 32
    return [
        SequenceRecord(f"sample-{number:012d}", "response", digest, digest, 700, piece)
        for number, piece in enumerate(pieces)
    ]


def make_caches(folder: Path, shards: int) -> tuple[Path, Path, list[str]]:
    """Write a finished and an unfinished cache; return both and the names of their shards."""
    names = [f"set-{number:06d}" for number in range(shards)]
    finished, unfinished = folder / "finished", folder / "unfinished"
    store = CacheStore.open(finished, FINGERPRINT, names)
    store.start()
    store.commit(names[0], make_sequences(SEQUENCES), [], CODEC)
    real = finished / SHARDS_NAME / names[0]
    content = (real / MANIFEST_NAME).read_bytes()
    for name in names[1:REAL]:
        _link(real, finished / SHARDS_NAME / name)
    entry = shard_entry(names[0], content, json.loads(content))
    job = job_content(FINGERPRINT, names)
    (finished / REJECTED_NAME).touch()
    files = {JOB_NAME: content_entry(canonical(job)), REJECTED_NAME: content_entry(b"")}
    cache = cache_content(job, [{**entry, "name": name} for name in names], files)
    (finished / CACHE_NAME).write_bytes(canonical(cache))
    begun = CacheStore.open(unfinished, FINGERPRINT, names)
    begun.start()
    for name in names[: shards - 1]:
        (unfinished / SHARDS_NAME / name).mkdir(parents=True)
    counts = DoneShard(SEQUENCES, entry["positions"], 0, entry["bytes"])
    for worker in range(WORKERS):
        with Heartbeat(begun.folder, 60.0) as heartbeat:
            journal = Journal(begun.folder, heartbeat.worker)
            mine = names[: shards - 1][worker::WORKERS]
            for start in range(0, len(mine), 1000):
                journal.note_all(dict.fromkeys(mine[start : start + 1000], counts))
    return finished, unfinished, names


def _link(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, place)


def measure_open(cache: str) -> dict[str, float]:
    """Seconds to open a cache, and growth of the resident memory."""
    before = resident_bytes()
    reset_peak()
    began = time.perf_counter()
    opened = open_cache(cache)
    seconds = time.perf_counter() - began
    grown = resident_bytes() - before
    assert len(opened) == len(opened.shard_names) * SEQUENCES
    return {
        "open_seconds": seconds,
        "open_mb": grown / 2**20,
        "open_peak_mb": (resident_bytes(peak=True) - before) / 2**20,
    }


def measure_first_batch(cache: str) -> dict[str, float]:
    """Seconds until 64 sequences of one shard are decoded, found by their keys."""
    began = time.perf_counter()
    opened = open_cache(cache)
    keys = pa.chunked_array([pa.array([f"sample-{number:012d}" for number in range(SEQUENCES)])])
    rows = opened.rows(keys, "response", {opened.shard_names[7]: range(SEQUENCES)})
    chosen = np.random.default_rng(0).choice(rows, BATCH, replace=False)
    targets = opened.targets(chosen)
    seconds = time.perf_counter() - began
    assert len(targets.target_ids_N) >= BATCH
    many = pa.chunked_array(keys.chunks * (REAL - 8))
    spans = {
        opened.shard_names[shard]: range((shard - 8) * SEQUENCES, (shard - 7) * SEQUENCES) for shard in range(8, REAL)
    }
    began = time.perf_counter()
    assert (opened.rows(many, "response", spans) >= 0).all()
    return {"first_batch_seconds": seconds, "shard_rows_seconds": (time.perf_counter() - began) / (REAL - 8)}


def measure_shard(cache: str) -> dict[str, float]:
    """Seconds to verify one shard, and to read its mean tail."""
    opened = open_cache(cache)
    folder = Path(cache) / SHARDS_NAME / opened.shard_names[3]
    began = time.perf_counter()
    check = ShardCheck(folder, opened.shard_names[0], None)
    seconds = time.perf_counter() - began
    assert not [problem for problem in check.problems if "does not match its records" not in problem]
    began = time.perf_counter()
    tail_sums(opened._folder, opened._shards[:REAL], VOCABULARY)
    return {"verify_shard_seconds": seconds, "tail_profile_seconds": (time.perf_counter() - began) / REAL}


def measure_status(cache: str) -> dict[str, float]:
    """Seconds to read the status of an unfinished cache."""
    began = time.perf_counter()
    found = read_status(cache)
    seconds = time.perf_counter() - began
    assert (found.complete, found.done) == (False, found.shards - 1)
    return {"status_seconds": seconds}


def _alone(measure: Callable[[str], dict[str, float]], cache: Path) -> dict[str, float]:
    """Measure in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (str(cache),))


def main() -> None:
    """Make the caches and measure."""
    arguments = parse_arguments(NAME, __doc__ or "")
    shards = QUICK_SHARDS if arguments.quick else SHARDS
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
        began = time.perf_counter()
        finished, unfinished, _ = make_caches(Path(scratch), shards)
        print(f"made in {time.perf_counter() - began:.0f} s")
        for measure, cache in (
            (measure_open, finished),
            (measure_first_batch, finished),
            (measure_shard, finished),
            (measure_status, unfinished),
        ):
            found |= _alone(measure, cache)
        sizes = {name: (finished / name).stat().st_size for name in (CACHE_NAME, JOB_NAME)}
        rows = [{"measure": name, "value": value} for name, value in [*found.items(), *sizes.items()]]
        asked = ("open_seconds", "open_mb", "status_seconds", "first_batch_seconds")
        suffix = f"{shards // 1000}k_shards"
        ratios = {f"{name}_{suffix}": found[name] for name in asked} | {
            name: found[name] for name in ("verify_shard_seconds", "shard_rows_seconds", "tail_profile_seconds")
        }
        settings = {"shards": shards, "sequences_a_shard": SEQUENCES, "workers": WORKERS}
        finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
