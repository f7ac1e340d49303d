"""Tail estimators in training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from llavamod_offline.errors import TargetError
from tests.train.conftest import World, write_cache
from tests.train.reference import read_metrics
from train.engine.deepspeed_engine import World as Processes
from train.run import train
from train.setup import prepare

ONE = Processes(rank=0, size=1, local_size=1, device=torch.device("cpu"))
TRUNCATED = ("capture.top_p=0.5", "capture.top_k=4", "capture.tail_samples_max=6")


@pytest.fixture(scope="module")
def truncated(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose top-k leaves tails, with tail samples."""
    return write_cache(tmp_path_factory.mktemp("truncated") / "cache", world.chats, world.teacher, *TRUNCATED)


@pytest.fixture(scope="module")
def at_two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, captured for students that train at temperature 2."""
    folder = tmp_path_factory.mktemp("at_two") / "cache"
    return write_cache(folder, world.chats, world.teacher, *TRUNCATED, "capture.temperature=2")


def losses(world: World, output: Path, cache: Path, *settings: str) -> list[float]:
    train(world.config("mimic_dense", output, f"cache.path={cache}", *settings))
    return [entry["loss"] for entry in read_metrics(output)]


def test_tails_are_read_by_their_samples_unless_something_else_is_asked_for(
    world: World, tmp_path: Path, truncated: Path
) -> None:
    settings = {tail: f"loss.tail={tail}" for tail in ("auto", "samples", "bucket")}
    logs = {tail: losses(world, tmp_path / tail, truncated, "steps=2", given) for tail, given in settings.items()}
    assert logs["auto"] == logs["samples"]
    assert logs["auto"] != logs["bucket"]


def test_other_divergences_read_the_tail_as_a_bucket(world: World, tmp_path: Path, truncated: Path) -> None:
    given = ("steps=2", "loss.divergence=js")
    auto = losses(world, tmp_path / "auto", truncated, *given)
    assert auto == losses(world, tmp_path / "bucket", truncated, *given, "loss.tail=bucket")


def test_few_records_that_are_read_many_times_are_smoothed(
    world: World, tmp_path: Path, truncated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps, smoothed in ((1, False), (4000, True)):
        with caplog.at_level(logging.INFO, logger="train.setup"):
            prepare(world.config("mimic_dense", tmp_path / "run", f"cache.path={truncated}", f"steps={steps}"), ONE)
        assert ("follows the teacher's mean tail" in caplog.text) == smoothed


def test_a_cache_is_read_at_the_temperature_it_was_captured_for(
    world: World, tmp_path: Path, truncated: Path, at_two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Any other needs a new capture, or the bucket by name, with a warning that its loss is blind in the tail."""
    assert all(losses(world, tmp_path / "2", at_two, "steps=2", "loss.temperature=2"))
    for name, cache, temperature in (("a", truncated, 2), ("b", at_two, 1)):
        with pytest.raises(TargetError, match=rf"capture again with capture.temperature={temperature}"):
            losses(world, tmp_path / name, cache, "steps=2", f"loss.temperature={temperature}")
        assert not (tmp_path / name / "metrics.jsonl").exists()
    with caplog.at_level(logging.WARNING):
        losses(world, tmp_path / "c", truncated, "steps=1", "loss.temperature=2", "loss.tail=bucket")
    assert "outside the top-k there" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("loss.kind=kd_lm",), ("loss.divergence=js",), ("loss.tail=samples",)])
def test_zero_3_gathers_the_head(world: World, tmp_path: Path, truncated: Path, settings: tuple[str, ...]) -> None:
    """The same losses and gradients as without ZeRO, tied embeddings included."""
    logs = []
    for stage in (0, 3):
        given = (f"cache.path={truncated}", "steps=3", f"engine.zero_stage={stage}", *settings)
        train(world.config("mimic_dense", tmp_path / str(stage), *given))
        logs.append(read_metrics(tmp_path / str(stage)))
    for plain, sharded in zip(*logs, strict=True):
        assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert sharded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(world: World, tmp_path: Path, truncated: Path) -> None:
    logs = []
    for checkpointing in ("false", "true"):
        settings = (f"cache.path={truncated}", "steps=3", f"engine.gradient_checkpointing={checkpointing}")
        train(world.config("mimic_dense", tmp_path / checkpointing, *settings))
        logs.append(read_metrics(tmp_path / checkpointing))
    for plain, recomputed in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert recomputed[name] == plain[name]
