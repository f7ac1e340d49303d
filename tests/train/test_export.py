"""The end of a run: the last checkpoint, the export, and what remains when the disk is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llavamod_offline.errors import ConfigError
from tests.train.conftest import World
from tests.train.test_checkpoint import assert_same_run
from train.checkpoint import latest_checkpoint
from train.metrics import METRICS_NAME
from train.run import train


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a nearly full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def weights_size(student: Path) -> int:
    return (student / "model.safetensors").stat().st_size


@pytest.mark.parametrize("save_steps", [0, 1000])
def test_a_full_disk_at_the_export_loses_no_step(world: World, tmp_path: Path, save_steps: int) -> None:
    """`align` trains a projector: its checkpoint still fits where the student does not."""
    settings = ("steps=3", f"save_steps={save_steps}")
    train(world.config("align", tmp_path / "whole", *settings))
    config = world.config("align", tmp_path / "run", *settings)
    message = r"^output: cannot write the student to .* free disk space, .* only exports$"
    size = weights_size(tmp_path / "whole" / "student")
    with largest_file(size - 1), pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "run" / "student").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    log = (tmp_path / "run" / METRICS_NAME).read_text()
    summary = train(config)
    assert (tmp_path / "run" / METRICS_NAME).read_text() == log  # no step was repeated
    assert summary.finished
    assert summary.steps == 3
    assert summary.metrics["step"] == 3
    assert f"{summary.metrics['loss']:.5g}" in (tmp_path / "run" / "student" / "README.md").read_text()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (latest_checkpoint(tmp_path / "run") is None) == (save_steps == 0)


def test_a_disk_without_room_for_the_last_checkpoint_may_hold_the_student(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """AdamW's moments are twice the student: a run that used to end well must not fail for a checkpoint."""
    train(world.config("sft", tmp_path / "whole", "steps=2"))
    size = weights_size(tmp_path / "whole" / "student")
    with largest_file(size + 4096):
        assert train(world.config("sft", tmp_path / "run", "steps=2")).finished
    assert "cannot write a checkpoint to" in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with largest_file(size - 1), pytest.raises(ConfigError, match=r"^output: cannot write a checkpoint to ") as caught:
        train(world.config("sft", tmp_path / "neither", "steps=2"))
    assert "\n" not in str(caught.value)
    assert train(world.config("sft", tmp_path / "neither", "steps=2")).finished


def test_a_student_that_was_removed_is_exported_again(world: World, tmp_path: Path) -> None:
    config = world.config("align", tmp_path / "run", "steps=2")
    first = train(config)
    kept = (tmp_path / "run" / "student").rename(tmp_path / "student")
    log = (tmp_path / "run" / METRICS_NAME).read_text()
    assert train(config) == first
    assert (tmp_path / "run" / METRICS_NAME).read_text() == log
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == (
        kept / "model.safetensors"
    ).read_bytes()
