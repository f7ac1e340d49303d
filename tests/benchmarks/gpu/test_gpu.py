"""`gpu.sh --dry` fills every row of its table; an empty row is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu.table import collected
from tests.benchmarks.test_form import GPU_PARTS, assert_form

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_dry_run_fills_every_row(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "tests/benchmarks/gpu.sh", "--dry", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.stem for file in tmp_path.glob("*.json")} == set(GPU_PARTS)
    for name in GPU_PARTS:
        assert_form(tmp_path / f"{name}.json", name, (tmp_path / f"{name}.log").read_text())
    assert all(row["measured"] != "" for row in collected(tmp_path))


def test_a_part_without_a_result_leaves_empty_rows_and_fails(tmp_path: Path) -> None:
    result = {"device": "H200", "rows": [{"case": "fed", "samples_per_s": 5.0}], "ratios": {"waiting_share": 0.01}}
    (tmp_path / "feed.json").write_text(json.dumps(result))
    rows = {(row["part"], row["what"]): row["measured"] for row in collected(tmp_path)}
    assert rows["feed", "waiting_share"] == 0.01
    assert rows["feed", "samples_per_s"] == 5.0
    assert rows["feed", "fed_vs_resident"] == ""
    assert rows["loss", "time_vs_liger_*"] == ""
    command = [sys.executable, "-m", "tests.benchmarks.gpu.table", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rows are empty" in done.stderr


def test_what_is_short_of_the_asked_is_marked(tmp_path: Path) -> None:
    ratios = {"offline_vs_sft_time": 1.04, "sparse_vs_dense_time": 1.2}
    (tmp_path / "step.json").write_text(json.dumps({"device": "H200", "rows": [], "ratios": ratios}))
    verdicts = {row["what"]: row[""] for row in collected(tmp_path)}
    assert verdicts["offline_vs_sft_time"] == "met"
    assert verdicts["sparse_vs_dense_time"] == "short"
