"""Every benchmark runs in its quick form and writes the one form of result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.form import median_seconds, table

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "form", "test_form")
)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_writes_the_form(name: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert set(result) == {"benchmark", "device", "date", "settings", "rows", "ratios"}
    assert result["benchmark"] == name
    assert result["rows"]
    assert all(isinstance(value, float) for value in result["ratios"].values())
    assert all(ratio in done.stdout for ratio in result["ratios"])


def test_cases_are_measured_in_turn() -> None:
    order: list[str] = []
    median_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3


def test_a_table_has_a_column_for_every_name() -> None:
    lines = table([{"case": "x", "seconds": 0.5}, {"case": "longer", "MiB": 3}]).splitlines()
    assert lines[0].split() == ["case", "seconds", "MiB"]
    assert len({len(line.rstrip()) for line in lines[:1]}) == 1
    assert table([]) == "(no rows)"
