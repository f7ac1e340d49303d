"""The form that every benchmark shares: `python -m tests.benchmarks.NAME [--quick] --json FILE`.

It prints a table and writes `{"benchmark", "device", "date", "settings", "rows": [...], "ratios": {name: number}}`.
Compared pairs are measured alternately in one run and medians are taken, since machines are noisy; quote the ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from llavamod_offline.plural import counted

Row = Mapping[str, str | float | int]


@dataclass(frozen=True)
class Arguments:
    """A benchmark's command line: whether to be quick, where to write, and options of its own."""

    quick: bool
    json_file: Path | None
    options: dict[str, Any] = field(default_factory=dict)


def parse_arguments(name: str, description: str, options: Mapping[str, Any] | None = None) -> Arguments:
    """Read the command line; `options` maps further option names (without dashes) to their defaults."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    parser.add_argument("--json", type=Path, help="file for the result")
    for option, default in (options or {}).items():
        if default is False:
            parser.add_argument(f"--{option}", action="store_true")
        else:
            parser.add_argument(f"--{option}", default=default, type=type(default) if default is not None else str)
    parsed = vars(parser.parse_args())
    own = {option: parsed[option.replace("-", "_")] for option in options or {}}
    return Arguments(parsed["quick"], parsed["json"], own)


def median_seconds(cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Time the cases in turn, `repeats` rounds after `warmup`; return each one's median in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(warmup + repeats):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def least_seconds(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, tuple[float, float]]:
    """Time the cases in turn, `repeats` rounds after `warmup`: each one's minimum seconds and processor seconds."""
    least = dict.fromkeys(cases, (math.inf, math.inf))
    for round_number in range(warmup + repeats):
        for name, case in cases.items():
            started, worked = time.perf_counter(), time.process_time()
            case()
            taken = (time.perf_counter() - started, time.process_time() - worked)
            if round_number >= warmup:
                least[name] = (min(least[name][0], taken[0]), min(least[name][1], taken[1]))
    return least


@contextmanager
def waiting() -> Iterator[list[float]]:
    """Collect the seconds that this thread spends inside the block waiting for other threads' results."""
    thread, taken, result = threading.get_ident(), [], Future.result

    def timed(future: Future[Any], timeout: float | None = None) -> Any:
        started = time.perf_counter()
        try:
            return result(future, timeout)
        finally:
            if threading.get_ident() == thread:
                taken.append(time.perf_counter() - started)

    with mock.patch.object(Future, "result", timed):
        yield taken


def resident_bytes(*, peak: bool = False) -> int:
    """This process's resident memory, now or at its peak since `reset_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def reset_peak() -> None:
    """Reset the peak of the resident memory to the current value."""
    Path("/proc/self/clear_refs").write_text("5")


def finish(
    name: str, arguments: Arguments, *, settings: Mapping[str, Any], rows: Sequence[Row], ratios: Mapping[str, float]
) -> None:
    """Print the table and the ratios, and write the JSON file if one was asked for."""
    print(table(rows))
    for ratio, value in ratios.items():
        print(f"{ratio}: {value:.4g}")
    write(name, arguments, settings=settings, rows=rows, ratios=ratios)


def write(
    name: str, arguments: Arguments, *, settings: Mapping[str, Any], rows: Sequence[Row], ratios: Mapping[str, float]
) -> None:
    """Write the JSON file if one was asked for."""
    if arguments.json_file:
        result = {
            "benchmark": name,
            "device": device_name(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "settings": {"quick": arguments.quick, **settings},
            "rows": [{name: _jsonable(value) for name, value in row.items()} for row in rows],
            "ratios": {name: _jsonable(value) for name, value in ratios.items()},
        }
        arguments.json_file.parent.mkdir(parents=True, exist_ok=True)
        arguments.json_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Render rows as columns of equal width."""
    if not rows:
        return "(no rows)"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *[[_cell(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _jsonable(value: str | float) -> str | float | None:
    """NaN becomes null and infinity a word, since JSON has neither."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def device_name() -> str:
    """The GPU's name, or the CPU's with the number of cores this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {counted(len(os.sched_getaffinity(0)), 'core')}"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
