"""Trackers: what reaches a real TensorBoard log, and that nothing of one is imported unless asked."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from llavamod_offline.errors import ConfigError
from tests.train.conftest import World
from train.metrics import read_metrics
from train.run import train
from train.tracking import scalars, tracker

ENTRY = {"step": 3, "loss": 0.5, "expert_load": [[0.75, 0.25]], "chosen_reward": {"p50": -1.0}, "note": "text"}


def test_numbers_get_flat_names() -> None:
    assert scalars(ENTRY) == {"loss": 0.5, "expert_load/0/0": 0.75, "expert_load/0/1": 0.25, "chosen_reward/p50": -1.0}


def test_a_run_is_in_tensorboard_as_in_its_log(world: World, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(world.config("mimic_sparse", tmp_path / "run", "tracker=tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    log = read_metrics(tmp_path / "run")
    for name in ("loss", "kl", "lr", "expert_load/0/3"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([scalars(e)[name] for e in log])


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    absent = next(name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None)
    with (
        pytest.raises(ConfigError, match=rf"tracker: '{absent}' is not installed .*pip install {absent}"),
        tracker(absent, tmp_path, {}, resume_step=0),  # type: ignore[arg-type]
    ):
        pass


def test_a_tracker_that_breaks_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    with caplog.at_level(logging.WARNING), tracker("tensorboard", tmp_path, {}, resume_step=0) as track:
        track(ENTRY)
        track({"loss": 0.1})  # no step: what a broken connection does is the same to us
        track(ENTRY)
    assert len([record for record in caplog.records if "gave up" in record.message]) == 1


def test_none_imports_no_tracker() -> None:
    code = "import sys, train.run; print([n for n in ('tensorboard', 'wandb', 'trackio') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
