"""Two processes under torchrun do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import dump_config
from llavamod_offline.models.checkpoint import load_llava
from tests.train.conftest import World
from train.config import TrainConfig
from train.metrics import read_metrics
from train.run import train


def run_two(config: TrainConfig, folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run a configuration in two gloo processes."""
    (folder / "config.yaml").write_text(dump_config(config))
    scripts = Path(sys.executable).parent
    command = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    return subprocess.run(
        [*command, str(scripts / "train-student"), str(folder / "config.yaml"), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "zero_stage"), [("mimic_sparse", 0), ("mimic_sparse", 2), ("preference", 2)])
def test_two_processes_equal_one(world: World, tmp_path: Path, stage: str, zero_stage: int) -> None:
    """Same samples, same losses to rounding, the balance loss and the KL terms included; one of the two prints."""
    config = world.config(stage, tmp_path / "two", "batch.micro_size=2", "data.holdout=4", "eval_steps=4")
    done = run_two(config, tmp_path, f"engine.zero_stage={zero_stage}")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    train(world.config(stage, tmp_path / "one", "batch.micro_size=2", "data.holdout=4", "eval_steps=4"))
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert len(two) == len(one) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in sorted({"loss", "grad_norm", "positions", "tokens", "balance", "holdout_loss"} & ours.keys()):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        if "chosen_reward" in ours:
            assert ours["chosen_reward"] == pytest.approx(theirs["chosen_reward"], rel=1e-4)
    students = [load_llava(tmp_path / run / "student").state_dict() for run in ("one", "two")]
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(world: World, tmp_path: Path) -> None:
    """A checkpoint of step 2 by two processes; the batch size must fit the number of processes."""
    config = world.config("sft", tmp_path / "run", "batch.micro_size=2", "save_steps=2", "steps=4")
    done = run_two(config, tmp_path, "batch.micro_size=8")
    assert done.returncode != 0
    assert "batch.global_size: 8 is no multiple of batch.micro_size 8 × 2 processes" in done.stderr
    assert run_two(config, tmp_path).returncode == 0
    whole = [entry["loss"] for entry in read_metrics(tmp_path / "run")]
    (tmp_path / "run" / "summary.json").unlink()
    train(config)
    assert [entry["loss"] for entry in read_metrics(tmp_path / "run")] == pytest.approx(whole, rel=1e-5)
