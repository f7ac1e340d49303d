"""Stopping and resuming: the loss curve and the weights equal those of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavamod_offline.errors import ConfigError, LlavaModError, ModelError
from tests.train.conftest import World, wait_for_lines
from tests.train.reference import read_metrics
from train.checkpoint import latest_checkpoint
from train.config import TrainConfig
from train.metrics import METRICS_NAME, MetricsLog
from train.run import train

_CLOCK = ("seconds", "tokens_per_s", "data_wait_share")


def curve(output: Path) -> list[dict[str, Any]]:
    """The log without fields that depend on the clock."""
    return [{key: value for key, value in entry.items() if key not in _CLOCK} for entry in read_metrics(output)]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def train_until_sigterm(config: TrainConfig, lines: int) -> int:
    """Train until a SIGTERM that comes while the log's `lines`-th line is written; return the number of steps done."""
    written = 0
    write = MetricsLog.write

    def write_and_stop(log: MetricsLog, entry: dict[str, Any]) -> None:
        nonlocal written
        write(log, entry)
        written += 1
        if written == lines:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_stop)
        summary = train(config)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not summary.finished
    assert not (Path(config.output) / "student").exists()
    return summary.steps


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    train(world.config("mimic_sparse", output, "steps=8", "save_steps=0"))
    return output


def test_sigterm_saves_and_the_same_call_goes_on(world: World, undisturbed: Path, tmp_path: Path) -> None:
    config = world.config("mimic_sparse", tmp_path / "run", "steps=8", "save_steps=0")
    done = train_until_sigterm(config, lines=3)
    assert done == 3
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / f"step-{done:08d}"
    summary = train(config)
    assert summary.finished
    assert summary.steps == 8
    assert summary.tokens == sum(entry["tokens"] for entry in read_metrics(undisturbed))
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_killed_run_repeats_nothing_that_was_saved(world: World, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL right after steps 2 and 5, with a checkpoint every second step."""
    settings = ("steps=8", "save_steps=2", "keep_last=1")
    config = world.config("mimic_sparse", tmp_path / "run", *settings)
    (tmp_path / "config.yaml").write_text((undisturbed / "config.yaml").read_text())
    command = [str(Path(sys.executable).with_name("train-student")), str(tmp_path / "config.yaml")]
    for lines in (2, 5):
        process = subprocess.Popen(
            [*command, f"output={tmp_path / 'run'}", *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        wait_for_lines(tmp_path / "run" / METRICS_NAME, lines)
        process.kill()
        _, errors = process.communicate()
        assert b"Traceback" not in errors
    train(config)
    assert_same_run(tmp_path / "run", undisturbed)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000008"]


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_is_the_same_run(world: World, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL at any instruction: during the start, in a step, while a checkpoint is written.

    A run that finishes before its kill must equal the undisturbed one too; then a new one starts, with earlier kills.
    """
    rng = random.Random(5)
    config = world.config("mimic_sparse", tmp_path / "run", "steps=8", "save_steps=1", "keep_last=2")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run"])
    kills, in_steps, patience = 0, 0, 1.0
    while kills < 10 or in_steps < 3:
        process = context.Process(target=train, args=(config,))
        process.start()
        begun = latest_checkpoint(tmp_path / "run")
        if amid_steps := kills % 2 == 1:  # every other run dies while starting, the rest once they have saved something
            while latest_checkpoint(tmp_path / "run") == begun and process.is_alive():
                time.sleep(0.002)
        process.join(rng.uniform(0, patience * (0.1 if amid_steps else 1.5)))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            in_steps += amid_steps
            continue
        assert process.exitcode == 0
        assert_same_run(tmp_path / "run", undisturbed)
        shutil.rmtree(tmp_path / "run")
        patience /= 2
    train(config)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_resumes_what_plain_training_saved_and_the_other_way_round(
    world: World, tmp_path: Path, zero_stage: int
) -> None:
    """Checkpoints hold whole tensors: any ZeRO stage resumes from any other's, with equal losses up to rounding."""
    train(world.config("sft", tmp_path / "plain", "steps=6", "engine.zero_stage=0"))
    for first, then in ((0, zero_stage), (zero_stage, 0)):
        output = tmp_path / f"{first}-{then}"
        train_until_sigterm(world.config("sft", output, "steps=6", f"engine.zero_stage={first}"), lines=2)
        assert train(world.config("sft", output, "steps=6", f"engine.zero_stage={then}")).finished
        losses = [entry["loss"] for entry in read_metrics(output)]
        assert losses == pytest.approx([entry["loss"] for entry in read_metrics(tmp_path / "plain")], rel=1e-5)


def test_bfloat16_goes_on_from_its_float32_weights(world: World, tmp_path: Path) -> None:
    config = world.config("sft", tmp_path / "run", "steps=6", "engine.dtype=bfloat16")
    train(world.config("sft", tmp_path / "whole", "steps=6", "engine.dtype=bfloat16"))
    train_until_sigterm(config, lines=2)
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert curve(tmp_path / "run")[-1]["loss"] < 0.8 * curve(tmp_path / "run")[0]["loss"]
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}


def test_old_checkpoints_are_removed(world: World, tmp_path: Path) -> None:
    train(world.config("align", tmp_path / "run", "steps=6", "save_steps=1", "keep_last=2"))
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000005", "step-00000006"]


def test_other_settings_or_contents_are_refused(world: World, tmp_path: Path) -> None:
    config = world.config("mimic_dense", tmp_path / "run", "steps=6")
    train_until_sigterm(config, lines=1)

    def refused(*settings: str) -> str:
        with pytest.raises(ConfigError) as caught:
            train(world.config("mimic_dense", tmp_path / "run", "steps=6", *settings))
        return str(caught.value)

    assert refused("optim.eps=2e-8").startswith("optim.eps: ")
    assert "was started with 1e-08, not 2e-08" in refused("optim.eps=2e-8")
    assert refused("seed=1").startswith("seed: ")
    assert refused("trainable=[projector]").startswith("trainable: ")
    assert refused("data.window=1").startswith("data.window: ")
    assert refused("data.weights={tiny: 2}").startswith("data.weights")
    assert refused("data.group_by_length=true").startswith("data.group_by_length: ")
    assert refused("data.group_by_modality=true").startswith("data.group_by_modality: ")
    assert refused(f"student.checkpoint={world.other_student}").startswith("student: ")
    assert not (tmp_path / "run" / "student").exists()
    free = ("save_steps=3", "log_steps=2", "batch.micro_size=8", "workers=1")
    assert train(world.config("mimic_dense", tmp_path / "run", "steps=6", *free)).finished


def test_a_damaged_checkpoint_is_named(world: World, tmp_path: Path) -> None:
    config = world.config("align", tmp_path / "run")
    train_until_sigterm(config, lines=1)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    for name in ("optimizer.safetensors", "weights.safetensors", "state.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError, match=str(checkpoint)):
            train(config)


def test_a_checkpoint_that_cannot_be_written_is_one_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file stands where the folder should be")
    with pytest.raises(ConfigError, match=r"^output: cannot write a checkpoint to .*/run/checkpoints") as caught:
        train(world.config("align", tmp_path / "run", "save_steps=1"))
    assert "\n" not in str(caught.value)


def test_a_finished_run_is_not_repeated(world: World, tmp_path: Path) -> None:
    config = world.config("align", tmp_path / "run", "steps=2")
    first = train(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(config) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(ConfigError, match=r"^steps: "):
        train(world.config("align", tmp_path / "run", "steps=3"))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"no": "summary"}))
    with pytest.raises(LlavaModError, match="output"):
        train(config)
