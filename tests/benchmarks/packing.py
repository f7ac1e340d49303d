"""Packing and indexing: samples per second, with one process and with several.

    python -m tests.benchmarks.packing [--quick] --json FILE

The samples are LLaVA rows of two turns, each with a photograph-like JPEG of 640×480 pixels (quality 85, 75 kB). Packing
reads, decodes, hashes and writes them; indexing reads a tar, decodes and hashes. The text-only rows show what
everything but images costs; so do a million small rows of parquet, in files and row groups like those of data sets on
the Hub, which also show that memory stays flat. Files are in the page cache. `samples_per_s` is wall-clock time,
including the start of processes; `samples_per_core_s` is by processor seconds of all processes, which other load does
not change. `memory_mb_…`: the resident memory of the packing process and its two workers, sampled after each tenth of
the rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.pack.prepare import PreparedSources
from llavamod_offline.data.rows import RejectedRow, RowPlace
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.data.sources.source import Source, check_sources, describe_sources
from llavamod_offline.data.tars.tar_index import find_tars, index_tars
from llavamod_offline.processes import available_cores
from tests.benchmarks.form import finish, parse_arguments

NAME = "packing"
TARS = 4
FILES, GROUP_ROWS = 8, 10_000
_PICTURES = 16  # different ones


@dataclass(frozen=True)
class Rate:
    """Samples per second of wall-clock time, and per processor second."""

    samples_per_s: float
    samples_per_core_s: float


def packing_rate(folder: Path, *, samples: int, workers: int, pictures: bool = True) -> Rate:
    """How fast `pack` is; the files of rows and images lie below `folder` (made there if missing)."""
    rows = write_rows(folder, samples, pictures=pictures)
    output = folder / f"set-{rows.stem}-{workers}"

    def run() -> None:
        prepared = prepare_sources([rows], images=[folder / "pictures"], workers=workers)
        write_set(prepared, output, overwrite=True, shard_samples=-(-samples // TARS))

    return _rate(run, samples)


def indexing_rate(folder: Path, *, samples: int, workers: int) -> Rate:
    """How fast `index` is; `TARS` tars lie below `folder` (made there if missing)."""
    tars = folder / f"tars-{samples}"
    if not tars.exists():
        prepared = prepare_sources([write_rows(folder, samples)], images=[folder / "pictures"])
        write_set(prepared, tars, shard_samples=-(-samples // TARS))

    def run() -> None:
        index_tars(find_tars([tars]), folder / f"index-{workers}", overwrite=True, workers=workers)

    return _rate(run, samples)


@dataclass(frozen=True)
class Grown:
    """How fast many rows were packed, and the memory after each tenth of them, in megabytes, workers included."""

    rate: Rate
    memory_mb: list[float]


def many_rows(folder: Path, rows: int, *, workers: int = 2) -> Grown:
    """Pack parquet files of `rows` small rows in a process of its own."""
    (folder / "many").mkdir()
    for number in range(FILES):
        keys = range(number * rows // FILES, (number + 1) * rows // FILES)
        messages = [
            [
                {"role": "user", "content": f"What is there, number {key}?"},
                {"role": "assistant", "content": f"There is something to be seen, and it is number {key}."},
            ]
            for key in keys
        ]
        table = pa.table({"id": [f"row-{key}" for key in keys], "messages": messages})
        name = f"train-{number:05d}-of-{FILES:05d}.parquet"
        pq.write_table(table, folder / "many" / name, row_group_size=GROUP_ROWS)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(_pack_many, folder, rows, workers).result()


def _pack_many(folder: Path, rows: int, workers: int) -> Grown:
    memory: list[float] = []

    def watched(start: RowPlace | None) -> Iterator[PreparedSources | RejectedRow]:
        for number, row in enumerate(prepare_sources(sources, workers=workers, start=start), 1):
            yield row
            if number % (rows // 10) == 0:
                memory.append(_resident_mb())

    def run() -> None:
        write_set(watched, folder / "many-set", job={"sources": describe_sources(sources)})

    sources = check_sources([Source(folder / "many")], ())
    return Grown(_rate(run, rows), memory)


def _resident_mb() -> float:
    """The resident memory of this process and its children."""
    me = str(os.getpid())
    total = 0
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if process.name.isdigit():
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                pages = int((process / "statm").read_text().split()[1])
                total += pages * (me in (process.name, parent))
    return round(total * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def write_rows(folder: Path, samples: int, *, pictures: bool = True) -> Path:
    """Write a LLaVA file of `samples` rows and their images, unless they exist."""
    file = folder / f"{'rows' if pictures else 'text'}-{samples}.json"
    if file.exists():
        return file
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(_PICTURES if pictures else 0):
        (folder / "pictures" / f"{number}.jpg").write_bytes(_photograph(number))
    rows = []
    for number in range(samples):
        said = [
            {"from": "human", "value": f"{'<image>' if pictures else 'Hello.'}\nWhat is there, number {number}?"},
            {"from": "gpt", "value": f"There is something to be seen, and it is number {number}. " * 4},
        ]
        row: dict[str, object] = {"id": f"row-{number}", "conversations": said}
        rows.append(row | ({"image": f"{number % _PICTURES}.jpg"} if pictures else {}))
    file.write_text(json.dumps(rows))
    return file


def _photograph(seed: int) -> bytes:
    """Smooth areas with some noise, which compresses like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + rng.normal(0, 7, smooth.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, format="JPEG", quality=85)
    return stream.getvalue()


def _rate(run: Callable[[], object], samples: int) -> Rate:
    started, before = time.perf_counter(), os.times()
    run()
    after = os.times()  # the workers have ended
    return Rate(samples / (time.perf_counter() - started), samples / (sum(after[:4]) - sum(before[:4])))


def main() -> None:
    """Measure and write the result."""
    arguments = parse_arguments(NAME, __doc__ or "")
    samples, rounds = (400, 1) if arguments.quick else (2000, 1)
    many_small = 20_000 if arguments.quick else 1_000_000
    many = available_cores()
    rates: dict[str, list[Rate]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        packing_rate(folder, samples=100, workers=1)  # imports, and the page cache
        for _ in range(rounds):
            for workers in (1, many):
                named = f"{workers} process(es)"
                rate = packing_rate(folder, samples=samples, workers=workers)
                rates.setdefault(f"pack, {named}", []).append(rate)
                rate = packing_rate(folder, samples=10 * samples, workers=workers, pictures=False)
                rates.setdefault(f"pack text, {named}", []).append(rate)
                rates.setdefault(f"index, {named}", []).append(indexing_rate(folder, samples=samples, workers=workers))
        grown = many_rows(folder, many_small)
        rates[f"pack parquet, {many_small:,} rows, 2 process(es)"] = [grown.rate]
    clock = {case: median(rate.samples_per_s for rate in found) for case, found in rates.items()}
    core = {case: median(rate.samples_per_core_s for rate in found) for case, found in rates.items()}
    rows: list[dict[str, str | float | int]] = [
        {"case": case, "samples_per_s": clock[case], "samples_per_core_s": core[case]} for case in rates
    ]
    ratios = {
        f"{case}_per_core_{many}_over_1": core[f"{case}, {many} process(es)"] / core[f"{case}, 1 process(es)"]
        for case in ("pack", "pack text", "index")
    }
    memory = {"after_a_tenth": grown.memory_mb[0], "at_the_end": grown.memory_mb[-1], "peak": max(grown.memory_mb)}
    rows[-1] |= {f"memory_mb_{when}": found for when, found in memory.items()}
    ratios["memory_of_all_rows_over_a_tenth"] = grown.memory_mb[-1] / grown.memory_mb[0]
    finish(NAME, arguments, settings={"samples": samples, "tars": TARS}, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
