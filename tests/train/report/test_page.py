"""The page of a run: what it draws from the log, and what a damaged or unfinished run gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.errors import ConfigError
from tests.train.conftest import World
from train.report.expert_load import expert_load
from train.report.page import read_run, write_report
from train.run import train


def write_log(folder: Path, entries: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def entry(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "tokens_per_s": 100.0, "data_wait_share": 0.0, "lr": 1e-3, **values}


def test_the_page_of_a_real_sparse_run(world: World, tmp_path: Path) -> None:
    train(world.config("mimic_sparse", tmp_path / "run", "data.holdout=4", "eval_steps=2"))
    page = write_report([tmp_path / "run"], tmp_path / "pages" / "run.html").read_text()
    for title in (
        "Loss and its terms", "held-out samples", "True KL", "Expert load over", "Choices dropped", "Learning rate",
        "its own / random routing",
    ):  # fmt: skip
        assert title in page, title
    assert "Preference" not in page
    assert page.count("data-chart=") >= 10
    assert len(re.findall(r"expert \d, step \d+: ", page)) == 4 * 4  # steps × experts of one sparse layer
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)


def test_several_runs_are_drawn_over_one_another(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / name / "run", [entry(1, kl=0.5), entry(2, kl=0.4)]) for name in ("a", "b<i>")]
    page = write_report(folders, tmp_path / "page.html").read_text()
    assert '"a/run"' in page
    assert '"b\\u003ci\\u003e/run"' in page
    assert "b&lt;i&gt;/run" in page
    assert "<i>/run" not in page
    with pytest.raises(ConfigError, match="listed twice"):
        write_report([folders[0], folders[0]], tmp_path / "page.html")


def test_stages_have_axes_of_their_own_and_a_run_one_colour(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / name, [entry(1, kl=0.5), entry(2, kl=0.4)]) for name in ("one", "two", "three")]
    for folder, stage in zip(folders, ("mimic_dense", "sft", "mimic_dense"), strict=True):
        (folder / "config.yaml").write_text(f"stage: {stage}\n")
    page = write_report(folders, tmp_path / "page.html").read_text()
    charts = [json.loads(unescape(found)) for found in re.findall(r"data-chart='([^']*)'", page)]
    drawn = {chart["title"]: [(line["name"], line["colour"]) for line in chart["series"]] for chart in charts}
    assert drawn["Loss and its terms (mimic_dense)"] == [("one", 0), ("three", 2)]
    assert drawn["Loss and its terms (sft)"] == [("two", 1)]
    assert drawn["Learning rate: learning rate (sft)"] == [("two", 1)]
    assert "sft (not finished)" in page
    assert page.count('class="key"') == 3


def test_colours_say_how_far_a_load_is_from_its_share() -> None:
    load = expert_load([entry(1, expert_load=[[0.25, 0.5, 0.0, 0.25]])])
    assert load is not None
    (cells,) = load["layers"]
    assert [fill for _, _, fill, _ in cells] == ["#ffffff", "#d97706", "#2563eb", "#ffffff"]
    assert expert_load([entry(1)]) is None


def test_long_logs_are_drawn_in_spans(tmp_path: Path) -> None:
    logged = [entry(step, expert_load=[[0.5, 0.5]]) for step in range(1, 1001)]
    page = write_report([write_log(tmp_path / "run", logged)], tmp_path / "page.html").read_text()
    assert page.count("<rect") == 96 * 2
    assert "step 1 to 11" in page


def test_a_run_in_progress_and_a_damaged_one(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", [entry(1), entry(2)])
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "lo')
    assert [item["step"] for item in read_run(folder).entries] == [1, 2]
    assert "not finished" in write_report([folder], tmp_path / "page.html").read_text()
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(ConfigError, match=r"metrics.jsonl: line 1 is not a log entry"):
        read_run(folder)
    file.write_text("")
    with pytest.raises(ConfigError, match="is empty: wait for the first step"):
        read_run(folder)
    with pytest.raises(ConfigError, match=r"run '.*none': has no metrics.jsonl"):
        read_run(tmp_path / "none")


def test_the_command(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", [entry(1)])
    command = [str(Path(sys.executable).parent / "train-student"), "report"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'report.html'}\n")
    for arguments, problem in (
        ([folder, folder], "--output: required for several runs"),
        ([tmp_path], "has no metrics.jsonl"),
    ):
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert problem in done.stderr
        assert len(done.stderr.splitlines()) == 1
