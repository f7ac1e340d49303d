"""The records' tails in training: shrunk by weights that are learnt on the way, kept and shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavamod_offline.errors import ModelError
from tests.train.conftest import World, write_cache
from tests.train.reference import read_metrics
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from tests.train.test_processes import run_two
from train.run import train


@pytest.fixture(scope="module")
def truncated(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose heads leave tails, with draws from them."""
    settings = ("capture.top_p=0.5", "capture.top_k=4", "capture.tail_samples_max=6")
    return write_cache(tmp_path_factory.mktemp("truncated") / "cache", world.chats, world.teacher, *settings)


def test_tails_are_shrunk_unless_something_else_is_asked_for(world: World, tmp_path: Path, truncated: Path) -> None:
    """The first step is the bucket's, with nothing learnt; the weights then leave 0, and the weights' paths part."""
    logs = {}
    for tail in ("auto", "shrink", "bucket", "samples"):
        settings = (f"cache.path={truncated}", "steps=5", f"loss.tail={tail}")
        train(world.config("mimic_dense", tmp_path / tail, *settings))
        logs[tail] = read_metrics(tmp_path / tail)
    losses = {tail: [entry["loss"] for entry in log] for tail, log in logs.items()}
    assert losses["auto"] == losses["shrink"]
    assert losses["auto"][:2] == losses["bucket"][:2]
    assert losses["auto"][2:] != losses["bucket"][2:]
    assert losses["samples"] != losses["bucket"]
    weights = [entry["tail_samples_weight"] for entry in logs["auto"]]
    assert not any(weights[0])
    assert all(any(of_step) for of_step in weights[1:])
    assert all(0 <= weight <= 1 for of_step in weights for weight in of_step)
    assert "tail_samples_weight" not in logs["bucket"][0]


def test_what_is_learnt_of_tails_does_not_depend_on_micro_batches(
    world: World, tmp_path: Path, truncated: Path
) -> None:
    logs = []
    for micro_size in (8, 2):
        settings = (f"cache.path={truncated}", f"batch.micro_size={micro_size}")
        train(world.config("mimic_dense", tmp_path / str(micro_size), *settings))
        logs.append(read_metrics(tmp_path / str(micro_size)))
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["tail_samples_weight"] == pytest.approx(other["tail_samples_weight"], rel=1e-3, abs=1e-5)


def test_what_is_learnt_of_tails_survives_a_stop(world: World, tmp_path: Path, truncated: Path) -> None:
    """Bit for bit, as all else does."""
    settings = (f"cache.path={truncated}", "steps=6")
    train(world.config("mimic_dense", tmp_path / "whole", *settings))
    config = world.config("mimic_dense", tmp_path / "run", *settings, "save_steps=2")
    train_until_sigterm(config, lines=3)
    assert train(config).finished
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    (folder,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    (folder / "tail.safetensors").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ModelError, match=r"tail\.safetensors: damaged checkpoint"):
        train(config)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("loss.kind=kd_lm",), ("loss.divergence=js",), ("loss.tail=samples",)])
def test_zero_3_gathers_the_head(world: World, tmp_path: Path, truncated: Path, settings: tuple[str, ...]) -> None:
    """The same losses and gradients as without ZeRO, tied embeddings and all."""
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
        for name in ("loss", "grad_norm", "tail_samples_weight"):
            assert recomputed[name] == plain[name]


@pytest.mark.slow
def test_two_processes_learn_one_set_of_weights(world: World, tmp_path: Path, truncated: Path) -> None:
    """The first two steps are those of one process; from there on coherence is counted within each process."""
    settings = (f"cache.path={truncated}", "steps=4", "batch.micro_size=2")
    config = world.config("mimic_dense", tmp_path / "two", *settings, "save_steps=2")
    done = run_two(config, tmp_path)
    assert done.returncode == 0, done.stderr
    train(world.config("mimic_dense", tmp_path / "one", *settings))
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [entry["loss"] for entry in two[:2]] == pytest.approx([entry["loss"] for entry in one[:2]], rel=1e-5)
    assert any(two[1]["tail_samples_weight"])
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=0.05)
    (tmp_path / "two" / "summary.json").unlink()
    assert train(config).finished  # one process resumes for two, with the estimates of both
