"""Two processes under torchrun do what one does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import dump_config
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.checkpoint import load_llava
from tests.processes import script, start
from tests.tiny import break_image, tiny_samples
from tests.train.conftest import World, wait_for_lines
from tests.train.data.test_lengths import lengthened
from tests.train.reference import read_metrics
from train.checkpoint import latest_checkpoint
from train.config import TrainConfig
from train.engine.deepspeed_engine import World as Processes
from train.metrics import METRICS_NAME
from train.run import train
from train.setup import prepare


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
@pytest.mark.parametrize(
    ("stage", "zero_stage", "micro_size"),
    [("mimic_sparse", 2, 2), ("mimic_sparse", 3, 1), ("mimic_dense", 3, 1), ("preference", 0, 2)],
)
def test_two_processes_equal_one_which_can_go_on_for_them(
    world: World, tmp_path: Path, stage: str, zero_stage: int, micro_size: int
) -> None:
    """Same samples, same losses up to rounding, including the balance loss and the KL terms; one of the two prints.

    One process then resumes their checkpoint of step 5, with the same losses again. With micro-batches of one sample,
    there are steps in which one process has an image and the other has none.
    """
    settings = ("steps=10", f"batch.micro_size={micro_size}", "data.holdout=4", "eval_steps=5")
    config = world.config(stage, tmp_path / "two", *settings)
    done = run_two(config, tmp_path, f"engine.zero_stage={zero_stage}", "save_steps=5")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    train(world.config(stage, tmp_path / "one", *settings))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
    (tmp_path / "two" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000010")
    train(config)
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_trained_tower_needs_no_images_in_each_process(world: World, tmp_path: Path) -> None:
    """ZeRO-2 exchanges the gradients of all trained parameters, so each process must have them."""
    settings = ("steps=10", "batch.micro_size=1", "trainable=[projector,text,vision]")
    done = run_two(world.config("mimic_dense", tmp_path / "two", *settings), tmp_path, "engine.zero_stage=2")
    assert done.returncode == 0, done.stderr
    train(world.config("mimic_dense", tmp_path / "one", *settings))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_ctrl_c_reaches_both_processes_and_the_launcher_repeats_it(world: World, tmp_path: Path) -> None:
    """As with `deepspeed`: the terminal's SIGINT to each process, then the launcher's SIGTERM; both have saved."""
    config = world.config("mimic_sparse", tmp_path / "run", "steps=100000", "batch.micro_size=4")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = [
        start(["train-student", "mine.yaml"], cwd=tmp_path, env={**place, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    wait_for_lines(tmp_path / "run" / METRICS_NAME, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in processes:
            process.send_signal(number)
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode in (130, 143), stderr
        assert stdout == ""
        assert "Traceback" not in stderr
        assert "; to continue, run again: the same command" in stderr.splitlines()[-1]
    assert latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.slow
def test_a_ctrl_c_under_torchrun_saves_a_checkpoint(world: World, tmp_path: Path) -> None:
    config = world.config("mimic_sparse", tmp_path / "run", "steps=100000", "batch.micro_size=4")
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", script("train-student"), "mine.yaml"]
    process = start(command, cwd=tmp_path)
    wait_for_lines(tmp_path / "run" / METRICS_NAME, 2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert stderr.count("stopped by SIGINT: the run is saved up to step ") == 2
    assert latest_checkpoint(tmp_path / "run") is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def assert_equal_runs(one: Path, other: Path) -> None:
    """Assert logs equal up to rounding and equal students."""
    logs = read_metrics(one), read_metrics(other)
    assert len(logs[0]) == len(logs[1]) == 10
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in sorted({"loss", "grad_norm", "positions", "tokens", "balance", "holdout_loss"} & ours.keys()):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        if "chosen_reward" in ours:
            assert ours["chosen_reward"] == pytest.approx(theirs["chosen_reward"], rel=1e-4, abs=1e-6)
    students = [load_llava(run / "student").state_dict() for run in (one, other)]
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_share_the_measuring_and_stop_together_at_a_bad_sample(world: World, tmp_path: Path) -> None:
    """Both drop what either has found too long; the one that meets a damaged image stops both, with a checkpoint."""
    samples = tiny_samples(24)
    for row in (3, 10, 17):
        samples[row] = lengthened(samples[row], 60)
    write_set(samples, tmp_path / "set")
    settings = (
        f"data.set={tmp_path / 'set'}",
        "max_length=140",
        "data.too_long=drop",
        "steps=10",
        "batch.micro_size=2",
    )
    done = run_two(world.config("sft", tmp_path / "two", *settings), tmp_path)
    assert done.returncode == 0, done.stderr
    assert train(world.config("sft", tmp_path / "one", *settings)).samples == 21
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
    kept = [row for row in range(24) if row not in (3, 10, 17)]
    second = [kept[place] for place in Order(21, seed=0, batch_size=8).batch(2).tolist()[4:]]  # the other process's
    row = next(row for row in second if samples[row].images)
    break_image(tmp_path / "set", row)
    stopped = run_two(world.config("sft", tmp_path / "stopped", *settings), tmp_path)
    assert stopped.returncode != 0
    assert f"error: image '{samples[row].key} image 0': cannot be decoded: " in stopped.stderr
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000002"]
    write_set(samples, tmp_path / "set", overwrite=True)
    assert train(world.config("sft", tmp_path / "stopped", *settings)).finished
    assert_equal_runs(tmp_path / "stopped", tmp_path / "one")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["batch.micro_size=8"], "batch.global_size: 8 is not a multiple of batch.micro_size 8 × 2 processes"),
        (["data.holdout=3"], "data.holdout: 3 is not a multiple of the 2 processes"),
        (["engine.zero_stage=0", "engine.dtype=bfloat16"], "engine.zero_stage: 0 keeps no float32 weights"),
    ],
)
def test_what_does_not_fit_two_processes_is_refused(
    world: World, tmp_path: Path, settings: list[str], problem: str
) -> None:
    two = Processes(rank=0, size=2, local_size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=problem):
        prepare(world.config("sft", tmp_path / "run", *settings), two)
