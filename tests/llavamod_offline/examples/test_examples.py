"""The examples run in the toy world, give `train-student`'s loss on the same batch, and refuse wrong labels."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llavamod_offline.data.encode.collate import Batch
from llavamod_offline.errors import TargetError
from llavamod_offline.toyworld.datasets import write_datasets
from teacher_cache import open_cache
from tests.scripts import fork_script
from tests.train.reference import read_metrics
from train.config.recipes import resolve_config
from train.run import train

ROOT = Path(__file__).parents[3]
TEACHER = ROOT / "llavamod_offline/toyworld/checkpoints/teacher"
LANGUAGE_MODEL = ROOT / "llavamod_offline/toyworld/checkpoints/language_model"
BATCH = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world's files, packed and captured, and an aligned student, all made by the ordinary commands."""
    root = tmp_path_factory.mktemp("toy")
    sizes = {"align": 8, "general": BATCH, "multitask": 1, "preference": BATCH}
    write_datasets(root / "world", **sizes, error_share=0.0, seed=5)
    commands = [
        "llavamod-offline pack world/align.json --images world/images --output captions",
        "llavamod-offline pack world/general.json --images world/images --output general",
        "llavamod-offline pack world/preference.parquet --output preference",
        f"cache-teacher run data=general teacher={TEACHER} output=general-cache capture.preset=compact",
        f"cache-teacher run data=preference teacher={TEACHER} output=pairs-cache capture.preset=reference",
        "cache-teacher export pairs-cache --format trl --output reference.parquet",
        f"train-student align data.set=captions output=start student.vision_tower={TEACHER} steps=1 batch.global_size=8"
        f" batch.micro_size=8 student.language_model={LANGUAGE_MODEL}",
    ]
    for command in commands:
        status, stderr = fork_script(command.split(), root / "logs", before=partial(os.chdir, root)).ended()
        assert status == 0, stderr
    return root


def _first_loss(world: Path, output: Path, *arguments: str) -> float:
    """`train-student`'s first loss on one batch, which is the whole set."""
    shared = (f"output={output}", f"student.checkpoint={world}/start/student", "steps=1")
    batch = (f"batch.global_size={BATCH}", f"batch.micro_size={BATCH}", "engine.gradient_checkpointing=false")
    train(resolve_config([*arguments, *shared, *batch]))
    return float(read_metrics(output)[0]["loss"])


def _places(world: Path, data: str = "general", cache: str = "general-cache") -> tuple[Path, Path, Path]:
    return world / "start/student", world / data, world / cache


def _trainer_settings(output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def mimic_loss(world: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    output = tmp_path_factory.mktemp("runs") / "mimic"
    return _first_loss(world, output, "mimic_dense", f"data.set={world}/general", f"cache.path={world}/general-cache")


def test_a_plain_loop(world: Path, mimic_loss: float) -> None:
    from llavamod_offline.examples.plain_loop import train as train_plainly

    keys = sorted(open_cache(world / "general-cache").keys("response"))
    losses = train_plainly(*_places(world), [keys, keys], 1e-3)
    assert losses[0] == pytest.approx(mimic_loss, rel=1e-5)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("micro", [BATCH, 2])
def test_hf_trainer(world: Path, mimic_loss: float, tmp_path: Path, micro: int) -> None:
    """With micro-batches too: Trainer passes the loss the number of labels in the whole step."""
    from llavamod_offline.examples.hf_trainer import train as train_with_trainer

    keys = sorted(open_cache(world / "general-cache").keys("response"))
    settings = {**_trainer_settings(tmp_path), "per_device_train_batch_size": micro}
    settings["gradient_accumulation_steps"] = BATCH // micro
    losses = train_with_trainer(*_places(world), keys, **settings)
    assert losses[0] == pytest.approx(mimic_loss, rel=2e-4)  # Trainer logs four digits
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("kind", "average"), [("sigmoid", "false"), ("ipo", "true")])
def test_trl_dpo(world: Path, tmp_path: Path, kind: str, average: str) -> None:
    """TRL's `ipo` averages log-probs over tokens."""
    pytest.importorskip("trl")
    from llavamod_offline.examples.trl_dpo import train as train_with_trl

    ours = _first_loss(
        world,
        tmp_path / "run",
        "preference",
        f"data.set={world}/preference",
        f"cache.path={world}/pairs-cache",
        *("student.kind=dense", "student.capacity_factor=null", "loss.router_aux_coef=0"),
        *("trainable=[projector,mlp]", f"loss.kind={kind}", f"loss.average_log_probs={average}"),
    )
    settings = {**_trainer_settings(tmp_path / "trl"), "beta": 0.1, "bf16": False, "loss_type": kind}
    losses = train_with_trl(*_places(world, "preference", "pairs-cache"), world / "reference.parquet", **settings)
    assert losses[0] == pytest.approx(ours, rel=2e-4)
    assert losses[1] < losses[0]


def test_swapped_labels_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mistake in a collator might swap them."""
    from llavamod_offline.examples.plain_loop import train as train_plainly

    whole = Batch.model_inputs

    def swapped(batch: Batch) -> dict[str, torch.Tensor]:
        inputs = whole(batch)
        order = [1, 0, *range(2, BATCH)]
        return {**inputs, "labels": inputs["labels"][order]}

    monkeypatch.setattr(Batch, "model_inputs", swapped)
    keys = sorted(open_cache(world / "general-cache").keys("response"))
    with pytest.raises(TargetError, match="its supervised ids differ from the cache's"):
        train_plainly(*_places(world), [keys], 1e-3)


@pytest.mark.slow
def test_the_commands_in_their_docstrings_run(world: Path, tmp_path: Path) -> None:
    places = [str(place) for place in _places(world)]
    command = [sys.executable, "-m", "llavamod_offline.examples.plain_loop", *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 1: loss ")


@pytest.mark.parametrize("name", ["plain_loop", "hf_trainer", "trl_dpo"])
@pytest.mark.parametrize("arguments", [[], ["--help"], ["one"]])
def test_without_its_arguments_an_example_shows_its_usage(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "llavamod_offline" / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"usage: python -m llavamod_offline.examples.{name} STUDENT SET CACHE")
    assert stderr.count("\n") == 1
