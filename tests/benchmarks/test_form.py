"""Every benchmark runs in its quick form and writes its result in the shared form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import BENCHMARKS, compare
from tests.benchmarks.form import median_seconds, table

ROOT = Path(__file__).parents[2]
GPU_PARTS = ("loss", "step", "capture", "feed")  # which gpu/test_gpu.py runs


def assert_form(file: Path, name: str, printed: str) -> None:
    """A benchmark's JSON file has the shared form, and its ratios were printed."""
    result = json.loads(file.read_text())
    assert set(result) == {"benchmark", "device", "date", "settings", "rows", "ratios"}
    assert result["benchmark"] == name
    assert result["rows"]
    assert all(isinstance(value, float) for value in result["ratios"].values())
    assert all(ratio in printed for ratio in result["ratios"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in GPU_PARTS])
def test_a_benchmark_writes_the_form(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_form(file, name, done.stdout)


def test_cases_are_measured_in_turn() -> None:
    order: list[str] = []
    median_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3


def test_a_table_has_a_column_for_every_name() -> None:
    lines = table([{"case": "x", "seconds": 0.5}, {"case": "longer", "MiB": 3}]).splitlines()
    assert lines[0].split() == ["case", "seconds", "MiB"]
    assert len({len(line.rstrip()) for line in lines[:1]}) == 1
    assert table([]) == "(no rows)"


@pytest.mark.slow
def test_all_together_name_what_has_moved(tmp_path: Path) -> None:
    """Against a baseline that differs in one ratio, which may be the file that is written."""
    first = tmp_path / "first.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--only", "store", "--repeats", "1", "--json"]
    done = subprocess.run([*command, str(first)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(first.read_text())
    ratio, values = next(iter(result["ratios"]["store"].items()))
    result["ratios"]["store"] = {ratio: [1e6 + value for value in values]}
    first.write_text(json.dumps(result))
    table_file = tmp_path / "table.md"
    against = [str(first), "--baseline", str(first), "--markdown", str(table_file)]
    done = subprocess.run([*command, *against], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"moved beyond their noise: store: {ratio}\n" in done.stdout
    assert f"| store | {ratio} |" in table_file.read_text()


def test_a_ratio_has_moved_if_it_leaves_the_noise_of_both() -> None:
    assert compare([1.0, 1.1, 0.9], [1.1, 1.2, 1.0])["moved"] == ""
    assert compare([1.0, 1.001, 0.999], [1.1, 1.101, 1.099])["moved"] == "-9.1%"
    assert compare([1.0], [1.01])["moved"] == ""
    assert compare([1.0], None)["baseline"] == ""
