"""`train-student` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llavamod_offline.config import dump_config
from tests.processes import start
from tests.train.conftest import World, wait_for_lines
from train.checkpoint import latest_checkpoint
from train.config.recipes import resolve_config
from train.metrics import METRICS_NAME


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the console script."""
    script = Path(sys.executable).with_name("train-student")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_help_is_quick_and_lists_recipes_and_keys() -> None:
    began = time.monotonic()
    done = command("--help")
    took = time.monotonic() - began
    assert done.returncode == 0
    for expected in ("train-student mimic_sparse", "align, mimic_dense", "student.upcycle.num_experts=4"):
        assert expected in done.stdout
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, train.cli; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "False", f"--help took {took:.1f} s"


def test_the_help_of_a_recipe_shows_its_values() -> None:
    done = command("mimic_sparse", "--help")
    assert done.returncode == 0
    assert "Defaults are those of the recipe mimic_sparse.\n" in done.stdout
    assert {"loss.kind=kd_lm", "student.upcycle={…}", "batch.global_size=128"} <= set(done.stdout.split())
    assert "loss.kind=cross_entropy" in command("--help").stdout.split()


def test_the_config_is_printed_and_read_again(world: World, tmp_path: Path) -> None:
    config = world.config("align", tmp_path / "run", "steps=1")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    done = command("mine.yaml", "optim.lr=3e-4", "--print-config", cwd=tmp_path)
    assert done.returncode == 0
    assert "lr: 0.0003" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_prints_json_alone_on_stdout(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))  # where no test has kept lengths
    config = world.config("align", tmp_path / "run", "steps=1")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    done = command("mine.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["finished"]
    assert Path(summary["student"], "config.json").is_file()
    changes, template, measuring = done.stderr.splitlines()
    assert measuring == "measuring the lengths of 8 of 24 samples"
    assert template == f"template: qwen, that of {world.student}"
    assert changes.startswith("recipe align, changed: optim.warmup_ratio=0.0 (was 0.03), ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_all_processes_saves_a_checkpoint(number: signal.Signals, world: World, tmp_path: Path) -> None:
    """As a terminal or a scheduler sends it, to the main process and its workers alike."""
    config = world.config("align", tmp_path / "run", "steps=100000", "workers=1")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    process = start(["train-student", "mine.yaml", "--json"], cwd=tmp_path)
    wait_for_lines(tmp_path / "run" / METRICS_NAME, 3)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number, stderr
    assert not json.loads(stdout)["finished"]
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    step = json.loads(stdout)["steps"]
    assert checkpoint.name == f"step-{step:08d}"
    assert stderr.splitlines()[-1] == (
        f"stopped by {number.name}: the run is saved up to step {step} in {tmp_path}/run; "
        "to continue, run again: train-student mine.yaml --json"
    )
    assert "Traceback" not in stderr


def test_errors_are_one_line_with_status_2(tmp_path: Path) -> None:
    done = command("sft", "data.set=none", "student.checkpoint=none", "output=run", "optim.l=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown setting optim.l: did you mean optim.lr?\n"
    assert len(done.stderr.splitlines()) == 1
    done = command("sft", "data.set=none", "student.checkpoint=none", "output=run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "recipe sft\nerror: none: no such checkpoint folder: name one, or a Hub id such as org/name\n"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_command_line_is_one_line() -> None:
    for arguments, problem in (
        ([], "error: missing argument 'RECIPE|CONFIG.yaml|KEY=VALUE': see train-student --help"),
        (["report"], "error: missing argument 'RUN...': see train-student report --help"),
        (
            ["sft", "--learning-rate", "1"],
            "error: no such option: --learning-rate; settings are written as KEY=VALUE: write ",
        ),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(problem)
        assert done.stderr.count("\n") == 1


_WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None
import train.run, train.setup, train.loop, train.checkpoint
from train.cli import main
main()
"""


def test_a_folder_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "align").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_config(["align", "data.set=s", "output=o", "student.checkpoint=c"]).stage == "align"


def test_without_deepspeed_a_run_is_refused_before_anything_is_written(world: World, tmp_path: Path) -> None:
    config = world.config("align", tmp_path / "run", "steps=1")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    for arguments, status in ((["mine.yaml", "--print-config"], 0), (["--help"], 0), (["mine.yaml"], 2)):
        command = [sys.executable, "-c", _WITHOUT_DEEPSPEED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == status, done.stderr
    needed = "error: train-student needs deepspeed: pip install 'llavamod-offline[train]'"
    assert done.stderr.splitlines()[1:] == [needed]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "train", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "train-student mimic_sparse" in done.stdout
