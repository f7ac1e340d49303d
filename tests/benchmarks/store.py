"""A cache on disk: how fast records are written and read back, and the cost of opening a cache of a million sequences.

    python -m tests.benchmarks.store [--quick] --json FILE

The records are those of a synthetic teacher: 151,646 ids in a Zipf-like distribution, a top-k of 20 to 26 ids and a few
tail samples, about 100 positions per sequence, 1,000 sequences per shard. One core does everything.

`write_positions_per_s`: encode, compress, write and flush a shard. `decode_positions_per_s`: read, decompress and
decode whole shards for a temperature of 1. `read_positions_per_s`: read batches of 64 sequences as `SparseTargets`,
shuffled within a window of shards, each block decoded once. `open_seconds` and `open_mb` (growth of the resident
memory): `open_cache` in a process of its own.

What bounds reading: decoding a block, mostly gathers and running sums over the ids, is half of it, and padding to
tensors a sixth. Rows are read by `llavamod_offline/storage/zarr_rows.py`: with Zarr's own reader, which runs coroutines
and a thread for every chunk, arrays take as long to read as to decode, and `decode` takes 1.3 to 1.6 times as long and
`read` 1.25 to 1.45 times (six rounds in turn in one process, processor seconds on a busy machine).

Shape suffixes: N positions, K top-k slots or tail sample slots.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from teacher_cache.config import PRESETS
from teacher_cache.format.columns import ColumnFile
from teacher_cache.format.manifest import (
    CACHE_NAME,
    COLUMNS_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    cache_content,
    canonical,
    content_entry,
    file_entry,
    job_content,
    shard_entry,
)
from teacher_cache.format.record import Records
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import SEQUENCE_SCHEMA, SequenceRecord, write_sequences
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.write.store import CacheStore
from tests.benchmarks.form import Row, finish, parse_arguments, resident_bytes

NAME = "store"
VOCABULARY = 151_646
TEMPERATURES = (1.5, 2.0, 4.0)
PRESET = PRESETS["standard"]
CODEC = Codec(VOCABULARY, TEMPERATURES, PRESET.precision, PRESET.top_k or VOCABULARY, PRESET.tail_samples_max)
FINGERPRINT = {"capture": {"vocab_size": VOCABULARY, "temperatures": list(TEMPERATURES)}}
SHARD_SEQUENCES = 1_000
BATCH = 64


def make_records(n: int, seed: int) -> Records:
    """The synthetic teacher's records of `n` positions."""
    rng = np.random.default_rng(seed)
    slots = 48
    # Log-uniform ids: the id of rank r has a share of about 1/r. Of equal ids at a position the first stays.
    ids_NK = np.sort((VOCABULARY ** rng.random((n, slots))).astype(np.int32) - 1, axis=1)
    fresh_NK = np.diff(ids_NK, axis=1, prepend=-1) > 0
    shuffled_NK = np.argsort(np.where(fresh_NK, rng.random((n, slots)), 2.0), axis=1)
    ids_NK = np.take_along_axis(ids_NK, shuffled_NK, 1)
    counts_N = np.minimum(rng.integers(20, 27, n), fresh_NK.sum(1)).astype(np.int32)
    kept_NK = np.arange(slots) < counts_N[:, None]
    scores_NK = np.where(kept_NK, -np.log1p(np.arange(slots)) * rng.uniform(1, 4, (n, 1)), -np.inf)
    scores_NK[:, 1:] -= np.where(kept_NK, rng.exponential(0.3, (n, slots)), 0.0).cumsum(1)[:, 1:]
    tail_N = np.log(rng.uniform(0.001, 0.05, n))
    log_probs_NK = scores_NK - np.log(np.exp(scores_NK).sum(1, keepdims=True)) + np.log1p(-np.exp(tail_N))[:, None]
    draws_N = np.ceil(np.exp(tail_N) * 100).astype(np.int32)
    drawn_NK = np.sort(np.where(np.arange(slots) < draws_N[:, None], ids_NK[:, ::-1], VOCABULARY), axis=1)
    with np.errstate(invalid="ignore"):
        entropy_N = -np.nansum(np.exp(log_probs_NK) * log_probs_NK, axis=1) - np.exp(tail_N) * (tail_N - 8)
    normalisers_NS = np.stack(
        [np.log(np.exp(log_probs_NK / t).sum(1) + np.exp(tail_N / t) * 50) for t in TEMPERATURES], 1
    )
    return Records(
        target_ids_N=ids_NK[:, 0],
        target_log_probs_N=log_probs_NK[:, 0].astype(np.float32),
        entropy_N=entropy_N.astype(np.float32),
        tail_log_mass_N=tail_N.astype(np.float32),
        log_normalisers_NS=normalisers_NS.astype(np.float32),
        topk_counts_N=counts_N,
        tail_counts_N=draws_N,
        topk_ids_H=ids_NK[kept_NK],
        topk_log_probs_H=log_probs_NK[kept_NK].astype(np.float32),
        tail_ids_D=drawn_NK[drawn_NK < VOCABULARY],
    )


def make_sequences(shard: int, sequences: int) -> list[SequenceRecord]:
    """The sequences of one shard, 50 to 150 positions each."""
    lengths = np.random.default_rng(shard).integers(50, 151, sequences)
    pieces = make_records(int(lengths.sum()), shard).split(lengths.tolist())
    digest = f"{shard:064x}"
    keys = (f"sample-{shard * sequences + number:09d}" for number in range(sequences))
    return [
        SequenceRecord(key, "response", digest, digest, 700, piece) for key, piece in zip(keys, pieces, strict=True)
    ]


def measure_write(folder: Path, shards: list[list[SequenceRecord]]) -> list[float]:
    """Write a cache; return the positions per second of each shard."""
    names = [f"set-{number:06d}" for number in range(len(shards))]
    store = CacheStore.open(folder, FINGERPRINT, names)
    store.start()
    rates = []
    for name, sequences in zip(names, shards, strict=True):
        started = time.perf_counter()
        store.commit(name, sequences, [], CODEC)
        rates.append(sum(len(item.records) for item in sequences) / (time.perf_counter() - started))
    store.finalise()
    return rates


def measure_read(folder: Path, window: int, seed: int) -> float:
    """Open the cache afresh and read the first `window` shards in shuffled batches; return positions per second."""
    cache = open_cache(folder, temperature=1.0)
    items = cache.items(row for rows in cache.shard_rows()[:window] for row in rows)
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    positions = 0
    started = time.perf_counter()
    for start in range(0, len(order), BATCH):
        positions += len(cache.targets([items[number] for number in order[start : start + BATCH]]))
    return positions / (time.perf_counter() - started)


def measure_decode(folder: Path) -> float:
    """Open the cache afresh and decode every block of every shard; return positions per second."""
    files = [ColumnFile(shard / COLUMNS_NAME) for shard in sorted((folder / SHARDS_NAME).iterdir())]
    started = time.perf_counter()
    for file in files:
        file.records(0, file.blocks, ())
    return sum(file.positions for file in files) / (time.perf_counter() - started)


def write_large(folder: Path, sequences: int) -> None:
    """Write a cache of many sequences without columns, since opening reads none."""
    shards = []
    for number in range(sequences // SHARD_SEQUENCES):
        name = f"set-{number:06d}"
        target = folder / SHARDS_NAME / name
        target.mkdir(parents=True)
        rng = np.random.default_rng(number)
        hashes = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), SHARD_SEQUENCES, [None, pa.py_buffer(rng.bytes(16 * SHARD_SEQUENCES))]
        )
        first = number * SHARD_SEQUENCES
        columns = {
            "key": [f"llava-{row * 7919 % sequences:012d}" for row in range(first, first + SHARD_SEQUENCES)],
            "role": pa.DictionaryArray.from_arrays(np.zeros(SHARD_SEQUENCES, np.int8), pa.array(["response"])),
            "target_hash": hashes,
            "content_hash": hashes,
        }
        numbers = {
            field.name: pa.array(rng.integers(50, 150, SHARD_SEQUENCES).astype(field.type.to_pandas_dtype()))
            for field in SEQUENCE_SCHEMA
            if field.name not in columns
        }
        write_sequences(target / SEQUENCES_NAME, pa.RecordBatch.from_pydict({**columns, **numbers}, SEQUENCE_SCHEMA))
        file = f"{COLUMNS_NAME}/zarr.json"
        files = {SEQUENCES_NAME: file_entry(target / SEQUENCES_NAME), file: {"bytes": 10**7, "sha256": "0" * 64}}
        counts = {"sequences": SHARD_SEQUENCES, "positions": 10**5, "heads": 10**6, "draws": 10**5, "rejected": 0}
        manifest = {"format_version": 1, "name": name, "files": files, **counts}
        (target / MANIFEST_NAME).write_bytes(canonical(manifest))
        shards.append(shard_entry(name, canonical(manifest), manifest))
    job = canonical(job_content(FINGERPRINT, [shard["name"] for shard in shards]))
    (folder / JOB_NAME).write_bytes(job)
    beside = {JOB_NAME: content_entry(job), REJECTED_NAME: content_entry(b"")}
    (folder / CACHE_NAME).write_bytes(canonical(cache_content({"fingerprint": FINGERPRINT}, shards, beside)))


def measure_open(folder: Path) -> tuple[float, float]:
    """Seconds to open a cache in a process of its own, and MB by which that raises its resident memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_open_here, (folder,))


def _open_here(folder: Path) -> tuple[float, float]:
    before = resident_bytes()
    started = time.perf_counter()
    cache = TeacherCache(folder)
    seconds = time.perf_counter() - started
    grown = (resident_bytes() - before) / 1e6
    assert (f"llava-{7919:012d}", "response") in cache
    return seconds, grown


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    window, shard_sequences, large, repeats = (2, 50, 10_000, 1) if arguments.quick else (4, 1_000, 1_000_000, 5)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-store-") as scratch:
        folder = Path(scratch)
        shards = [make_sequences(shard, shard_sequences) for shard in range(window)]
        written = measure_write(folder / "cache", shards)
        size = json.loads((folder / "cache" / CACHE_NAME).read_bytes())["totals"]
        read = [measure_read(folder / "cache", window, seed) for seed in range(repeats)]
        decoded = [measure_decode(folder / "cache") for _ in range(repeats)]
        write_large(folder / "large", large)
        opened = [measure_open(folder / "large") for _ in range(repeats)]
    ratios = {
        "write_positions_per_s": statistics.median(written),
        "decode_positions_per_s": statistics.median(decoded),
        "read_positions_per_s": statistics.median(read),
        "open_seconds": statistics.median(seconds for seconds, _ in opened),
        "open_mb": statistics.median(grown for _, grown in opened),
        "bytes_per_position": size["bytes"] / size["positions"],
    }
    rows: list[Row] = [
        {"case": "write", "of": f"{len(written)} shards", "slowest": min(written), "fastest": max(written)},
        {"case": "decode", "of": f"{len(decoded)} passes", "slowest": min(decoded), "fastest": max(decoded)},
        {"case": "read", "of": f"{len(read)} passes", "slowest": min(read), "fastest": max(read)},
        {"case": "open (s)", "of": f"{large:,} sequences", "slowest": max(opened)[0], "fastest": min(opened)[0]},
    ]
    settings = {"codec": dataclasses.asdict(CODEC), "positions": size["positions"], "batch": BATCH, "window": window}
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
