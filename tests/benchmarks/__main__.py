"""Run every benchmark in its quick form and report which ratios have moved.

    python -m tests.benchmarks [--only loss,store] [--repeats 3] [--json FILE] [--markdown FILE] [--baseline FILE]

Each runs `--repeats` times. A ratio has moved if it differs from the baseline's (by default the committed one for this
kind of device, `results/quick-DEVICE.json`) by more than three times the spread of both. `--json` writes a file that
can serve as the next baseline: {"device", "date", "repeats", "ratios": {benchmark: {ratio: [one value per repeat]}}}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tests.benchmarks.form import device_name, table

HERE = Path(__file__).parent
BENCHMARKS = sorted(
    path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "__main__", "form", "test_form")
)
_SPREADS = 3.0
_LEAST = 0.02  # of a ratio: smaller changes are not worth reporting

Ratios = Mapping[str, Sequence[float]]


def main() -> int:
    """Run, compare and write; return the exit status, 1 if a benchmark failed."""
    arguments = _arguments()
    device = device_name()
    baseline = _read(arguments.baseline or HERE / "results" / f"quick-{_slug(device)}.json")
    found: dict[str, dict[str, list[float]]] = {}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {"device": device, "date": today, "repeats": arguments.repeats, "ratios": found}
    failed = []
    for name in arguments.only.split(",") if arguments.only else BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        runs = [_run(name) for _ in range(arguments.repeats)]
        if any(run is None for run in runs):
            failed.append(name)
            continue
        whole = [run for run in runs if run is not None]
        found[name] = {ratio: [run[ratio] for run in whole] for ratio in whole[0] if all(ratio in run for run in whole)}
        if arguments.json:  # after each, so that a run that is stopped leaves what it has measured
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        {"benchmark": name, "ratio": ratio, **compare(values, baseline.get(name, {}).get(ratio))}
        for name, ratios in found.items()
        for ratio, values in ratios.items()
    ]
    print(table(rows))
    moved = [f"{row['benchmark']}: {row['ratio']}" for row in rows if row["moved"]]
    known = "" if baseline else f"no baseline of {device}: --json writes one"
    print(known or (f"moved beyond their noise: {', '.join(moved)}" if moved else "nothing moved beyond its noise"))
    for name in failed:
        print(f"{name}: failed: python -m tests.benchmarks.{name} --quick", file=sys.stderr)
    if arguments.markdown:
        arguments.markdown.write_text(_markdown(rows))
    return int(bool(failed))


def compare(values: Sequence[float], before: Sequence[float] | None) -> dict[str, Any]:
    """A ratio's mean and spread, the baseline's, and the relative change if the ratio has moved, else ""."""
    now, spread = mean(values), _spread(values)
    row: dict[str, Any] = {"now": now, "spread": spread, "baseline": "", "moved": ""}
    if before:
        then = mean(before)
        noise = max(_SPREADS * math.hypot(spread, _spread(before)), _LEAST * abs(then))
        moved = abs(now - then) > noise
        row |= {
            "baseline": then,
            "moved": f"{(now - then) / abs(then):+.1%}" if moved and then else "*" if moved else "",
        }
    return row


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _run(name: str) -> dict[str, float] | None:
    """The ratios of a quick run; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick", "--json", str(file)]
        done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return None
        ratios = json.loads(file.read_text())["ratios"]
        return {ratio: value for ratio, value in ratios.items() if isinstance(value, float | int)}


def _read(file: Path) -> dict[str, Ratios]:
    ratios: dict[str, Ratios] = json.loads(file.read_text())["ratios"] if file.is_file() else {}
    return ratios


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| benchmark | ratio | now | spread | baseline | moved |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"benchmarks, separated by commas, of {', '.join(BENCHMARKS)}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, which show the noise")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--baseline", type=Path, help="an earlier file of --json")
    arguments = parser.parse_args()
    unknown = sorted(set(filter(None, arguments.only.split(","))) - set(BENCHMARKS))
    if unknown:
        parser.error(f"--only: '{unknown[0]}' is not among {', '.join(BENCHMARKS)}")
    if arguments.repeats < 1:
        parser.error("--repeats: must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
