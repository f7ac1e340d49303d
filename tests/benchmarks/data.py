"""Data loading: samples per second on one core against plain webdataset, a worker's memory, time to the first batch.

    python -m tests.benchmarks.data [--quick] --json FILE

`loader_vs_webdataset`: samples per processor second of the full loader, over those of webdataset, on the same tars of
336×336 JPEGs (27 kB each) in the same run, the two alternating pass by pass, one process and one thread each, files in
the page cache.
  webdataset: `WebDataset(tars).decode("torchrgb")`: scan the tars in order, group members, parse JSON, decode the
  JPEG to a float32 tensor [3, 336, 336] in 0 … 1. No join, no tokens, no batches, no shuffling, no state.
  ours: `train.data.batches.Loader` in a shuffled order, resumable at any step: read by position, parse and check
  the sample, decode the JPEG and fit it to CLIP's size (which it already has: nothing is resized), tokenise, compare
  the hashes of the sample and of the answer with the record's, find the records (80 positions a sample, 20 to 26 ids
  each; already decoded and kept in memory, see below), collate 16 samples to padded tensors. Images stay bytes [336,
  336, 3] in a batch: they are rescaled and normalised by a look-up at the start of the student's forward pass, which is
  not counted here.
That is a quarter of the bytes that webdataset has to write; row `webdataset torchrgb8` is its rate without floats, and
`later: pixel values` is the work that ours defers, on a CPU. Rows `ours: …` time each part by itself, the second time
it runs; `ours: decode records` is needed once per shard if all records fit in memory, as here, and otherwise once per
window. `transformers: …` is the time its own processor takes for the same pixels.
`worker_memory_growth_mb`: growth of a loader worker's private memory from a tenth of the samples to all of them
(200,000; images of 48 pixels, since their size does not matter here).
`first_batch_seconds`: from opening set and cache to the first batch of 64, with two workers, imports not counted: 5,000
shards of 1,000 samples under made-up keys, tars and columns being hard links to one shard's. It covers opening,
checking every table's checksum, joining by key, hashing the kept keys, shuffling, forking, and decoding the records of
a window of 16 shards.
`packing_samples_per_core_s`, `indexing_samples_per_core_s`: see `packing.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from llavamod_offline.data.encode.collate import collate
from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.images import decode_image, pixel_values
from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.families.llava.student import LlavaStudent
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.student.check import check_sequence
from tests.benchmarks.form import Row, finish, parse_arguments
from tests.benchmarks.packing import indexing_rate, packing_rate
from tests.benchmarks.worlds.data import make_encoder, make_preprocessor, write_large, write_world
from train.data.batches import Loader
from train.data.join import join
from train.data.sample_order import DEFAULT_WINDOW

NAME = "data"
BATCH = 16
FIRST_BATCH = 64


def open_loader(folder: Path, workers: int, batch_size: int = BATCH) -> tuple[Loader, Order]:
    """The loader over a world's set joined with its cache, and a run's default order."""
    samples, cache = SampleSet.open(folder / "set"), open_cache(folder / "cache", temperature=1.0)
    joined = join(samples, ("response",), cache, missing="error", holdout=0, seed=0)
    loader = Loader(
        samples,
        joined.rows,
        family=LlavaStudent(make_encoder(), make_preprocessor(), processor_source=folder),
        roles=("response",),
        cache=cache,
        records=joined.records,
        record_roles=("response",),
        workers=workers,
        pin_memory=False,
    )
    window = 0 if cache.fits_in_memory else DEFAULT_WINDOW
    if window:
        cache.keep_shards(window)
    shards_N = samples.shard_numbers(joined.rows)
    return loader, Order(len(joined.rows), seed=0, batch_size=batch_size, shards_N=shards_N, window=window)


def measure_rates(folder: Path, passes: int) -> dict[str, list[float]]:
    """Samples per processor second of both loaders, one number per pass."""
    import webdataset

    loader, order = open_loader(folder, workers=0)
    tars = sorted(str(file) for file in (folder / "set").glob("*.tar"))

    def ours(number: int) -> int:
        steps = order.n // BATCH
        schedule = BatchSchedule(order, stop=(number + 1) * steps, start=number * steps)
        return sum(batch.samples for batch in loader.batches(schedule))

    def theirs(kind: str) -> int:
        found = webdataset.WebDataset(tars, shardshuffle=False).decode(kind)
        return sum(tuple(sample["jpg"].shape) == (3, 336, 336) for sample in found)

    cases: dict[str, Callable[[int], int]] = {
        "ours": ours,
        "webdataset": lambda _: theirs("torchrgb"),
        "webdataset torchrgb8": lambda _: theirs("torchrgb8"),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(passes + 1):
        for name, run in cases.items():
            started = time.process_time()
            samples = run(number)
            if number:  # the first pass warms up
                rates[name].append(samples / (time.process_time() - started))
    return rates


def measure_parts(folder: Path, count: int) -> dict[str, float]:
    """Processor milliseconds per sample for each part of ours, and for transformers' own processor."""
    samples, cache = SampleSet.open(folder / "set"), open_cache(folder / "cache", temperature=1.0)
    encoder, images = make_encoder(), make_preprocessor()
    rows = np.random.default_rng(0).permutation(len(samples))[:count].tolist()
    read = [samples.read(row) for row in rows]
    pictures = [decode_image(sample.images[0], name=sample.key) for sample in read[:BATCH]]
    bytes_IHW3 = np.zeros((BATCH, *images.size, 3), np.uint8)
    values_3V = images.byte_values_3V
    sequences = [encoder.encode(sample, "response") for sample in read]
    records = cache.rows(samples.index.column("key"), "response", samples.shard_rows)[rows]
    batches = [slice(start, start + BATCH) for start in range(0, count, BATCH)]
    unhashed = iter([[replace(sample) for sample in read] for _ in range(2)])
    parts: dict[str, Callable[[], object]] = {
        "ours: read and check the sample": lambda: [samples.read(row) for row in rows],
        "ours: decode the JPEG": lambda: [decode_image(s.images[0], name=s.key) for s in read],
        "ours: fit and copy the picture": lambda: [
            _copy(images.fit(picture), out_HW3)
            for _ in batches
            for picture, out_HW3 in zip(pictures, bytes_IHW3, strict=True)
        ],
        "transformers: CLIP preprocessing": lambda: [
            images._processor(picture, return_tensors="np") for _ in batches for picture in pictures
        ],
        "ours: tokenise": lambda: [encoder.encode(sample, "response") for sample in read],
        "ours: compare hashes": lambda: [
            _compare(cache, records[batch], sequences[batch], some[batch])
            for some in [next(unhashed)]
            for batch in batches
        ],
        "ours: records": lambda: [cache.targets(records[batch]) for batch in batches],
        "ours: collate": lambda: [
            collate(sequences[batch], [[image] for image in bytes_IHW3], pad_id=0, byte_values_CV=values_3V)
            for batch in batches
        ],
        "later: pixel values": lambda: [
            pixel_values(torch.from_numpy(bytes_IHW3), torch.from_numpy(values_3V)) for _ in batches
        ],
    }
    milliseconds = {}
    for name, part in parts.items():
        for _ in range(2):
            started = time.process_time()
            part()
            milliseconds[name] = (time.process_time() - started) / count * 1e3
    fresh = open_cache(folder / "cache", temperature=1.0)
    started = time.process_time()
    fresh.targets(np.arange(len(fresh)))
    milliseconds["ours: decode records"] = (time.process_time() - started) / len(fresh) * 1e3
    return milliseconds


def _copy(picture: Image.Image, out_HW3: NDArray[np.uint8]) -> tuple[int, int]:
    out_HW3[:] = np.asarray(picture)
    return picture.size


def _compare(
    cache: TeacherCache, rows_B: NDArray[np.int64], sequences: list[TokenizedSequence], samples: list[Sample]
) -> list[str]:
    for sequence, record in zip(sequences, cache.sequences(rows_B), strict=True):
        check_sequence(cache, sequence, record=record)
    return [sample.content_hash for sample in samples]


def measure_memory(folder: Path, samples: int) -> list[tuple[int, float]]:
    """The single worker's private memory in MB, after every twentieth of the samples."""
    loader, order = open_loader(folder, workers=1)
    steps = samples // BATCH
    found, worker = [], None
    for step, _ in enumerate(loader.batches(BatchSchedule(order, stop=steps)), start=1):
        worker = worker or _only_child()
        if step % max(1, steps // 20) == 0:
            found.append((step * BATCH, _private_mb(worker)))
    return found


def measure_first_batch(folder: Path) -> float:
    """Seconds to the first batch, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_first_batch, (folder,))


def _first_batch(folder: Path) -> float:
    torch.set_num_threads(1)
    make_encoder()  # imports tokenizers and transformers
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers itself
    started = time.perf_counter()
    loader, order = open_loader(folder, workers=2, batch_size=FIRST_BATCH)
    batches = loader.batches(BatchSchedule(order, stop=10))
    first = next(batches)
    seconds = time.perf_counter() - started
    assert first.samples == FIRST_BATCH
    return seconds


def _only_child() -> int:
    children = [
        int(child)
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
        if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    (worker,) = children
    return worker


def _private_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Swap:")))
    return kilobytes / 1e3


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    quick = arguments.quick
    samples, passes, of_memory, rows = (64, 1, 640, 2_000) if quick else (2_000, 5, 200_000, 5_000_000)
    shard = 32 if quick else 1_000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as scratch:
        folder = Path(scratch)
        write_world(folder / "world", samples, shard_samples=shard)
        rates = measure_rates(folder / "world", passes)
        parts = measure_parts(folder / "world", min(samples, 512))
        write_world(folder / "tiny", samples, shard_samples=shard, side=48)
        memory = measure_memory(folder / "tiny", of_memory)
        write_large(folder / "world", folder / "large", rows)
        packing = measure_packing(folder / "packing", 32 if quick else 1_000)
        first = [measure_first_batch(folder / "large") for _ in range(1 if quick else 3)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        "loader_vs_webdataset": medians["ours"] / medians["webdataset"],
        "worker_memory_growth_mb": memory[-1][1] - memory[max(0, len(memory) // 10 - 1)][1],
        "first_batch_seconds": statistics.median(first),
        **packing,
    }
    table: list[Row] = [
        {"case": name, "unit": "samples/s", "median": medians[name], "slowest": min(values), "fastest": max(values)}
        for name, values in rates.items()
    ]
    table += [{"case": name, "unit": "ms/sample", "median": value} for name, value in parts.items()]
    table += [
        {"case": f"worker after {count:,} samples", "unit": "MB", "median": value}
        for count, value in memory[:: max(1, len(memory) // 5)]
    ]
    table.append(
        {
            "case": f"first batch of {rows:,} rows",
            "unit": "s",
            "median": statistics.median(first),
            "slowest": max(first),
            "fastest": min(first),
        }
    )
    settings = {"samples": samples, "passes": passes, "batch": BATCH, "memory_samples": of_memory, "rows": rows}
    finish(NAME, arguments, settings=settings | {"load": os.getloadavg()[0]}, rows=table, ratios=ratios)


def measure_packing(folder: Path, samples: int) -> dict[str, float]:
    """Samples per processor second when packing and when indexing, one process each."""
    return {
        "packing_samples_per_core_s": packing_rate(folder, samples=samples, workers=1).samples_per_core_s,
        "indexing_samples_per_core_s": indexing_rate(folder, samples=samples, workers=1).samples_per_core_s,
    }


if __name__ == "__main__":
    main()
