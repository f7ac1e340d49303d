"""Positions weighted by what the image contributes to them, against sums over plain forward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llavamod_offline.errors import ConfigError
from teacher_cache.read.reader import open_cache
from teacher_cache.visual.advantages import NOT_MEASURED
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader, read_metrics
from train.run import train

STRENGTH = 3.0
ONE_STEP = ("batch.global_size=24", "batch.micro_size=6", "steps=1", f"loss.visual_weight={STRENGTH}")


@pytest.fixture(scope="module")
def cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visual") / "cache"
    return write_cache(folder, world.chats, world.teacher, *EXHAUSTIVE, "capture.without_image=blank")


def weights_of(cache: Path) -> dict[str, torch.Tensor]:
    """The weights of each sample's positions, by the definition."""
    opened = open_cache(cache)
    codes = {key: opened.advantage_codes([(key, role)]) for key, role in opened.items()}
    gains = {key: 1 - np.exp(-np.maximum((own - 128.0) / 8, 0)) for key, own in codes.items()}
    mean = np.concatenate([gains[key][own != NOT_MEASURED] for key, own in codes.items()]).mean()
    return {
        key: torch.from_numpy(np.where(own == NOT_MEASURED, 1, (1 + STRENGTH * gains[key]) / (1 + STRENGTH * mean)))
        for key, own in codes.items()
    }


def expected(world: World, weights: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The weighted means of KL(teacher ‖ student) and of the student's cross-entropy over all samples."""
    teacher, student = Reader(world.teacher, world.chats), Reader(world.student, world.chats)
    divergences, losses = [], []
    for row in range(24):
        sample = teacher.samples.read(row)
        with torch.no_grad():
            own, other = teacher.answer(sample), student.answer(sample)
        p_NV, q_NV = own.log_probs_NV.double(), other.log_probs_NV.double()
        divergences.append(weights[sample.key] * (p_NV.exp() * (p_NV - q_NV)).sum(-1))
        losses.append(-weights[sample.key] * other.target_log_probs_N)
    return float(torch.cat(divergences).mean()), float(torch.cat(losses).mean())


def test_the_loss_is_the_weighted_mean(world: World, cache: Path, tmp_path: Path) -> None:
    weights = weights_of(cache)
    spread = torch.cat(list(weights.values()))
    assert float(spread.max() - spread.min()) > 0.5
    divergence, cross_entropy = expected(world, weights)
    train(world.config("mimic_dense", tmp_path / "kd", f"cache.path={cache}", *ONE_STEP))
    assert float(read_metrics(tmp_path / "kd")[0]["loss"]) == pytest.approx(divergence, rel=1e-4)
    both = (f"cache.path={cache}", "loss.kind=kd_lm", *ONE_STEP)
    train(world.config("mimic_dense", tmp_path / "both", *both))
    assert float(read_metrics(tmp_path / "both")[0]["loss"]) == pytest.approx(divergence + cross_entropy, rel=1e-4)


def test_each_of_several_caches_gives_its_own_weights(world: World, cache: Path, tmp_path: Path) -> None:
    """A mixture of a cache and a copy with other records, and one cache for all sources, act like that cache alone."""
    again = write_cache(tmp_path / "again", world.chats, world.teacher, "capture.without_image=blank")
    divergence, _ = expected(world, weights_of(cache))
    for name, path in (("mixed", f"[{cache},{again}]"), ("source", f'{{"*": {cache}}}')):
        train(world.config("mimic_dense", tmp_path / name, f"cache.path={path}", *ONE_STEP))
        loss = float(read_metrics(tmp_path / name)[0]["loss"])
        assert loss == pytest.approx(divergence, rel=1e-4 if name == "source" else 0.05)


def test_what_has_no_weights_is_refused(world: World, cache: Path, tmp_path: Path) -> None:
    for number, (stage, settings, message) in enumerate(
        [
            ("mimic_dense", (), "does not say what images are worth: capture it with capture.without_image"),
            ("mimic_dense", (f"cache.path={cache}", "loss.visual_weight=-1"), "must not be negative"),
            ("preference", (), "loss.visual_weight: belongs to the mimic stages"),
        ]
    ):
        with pytest.raises(ConfigError, match=message):
            train(world.config(stage, tmp_path / str(number), *ONE_STEP, *settings))
