"""KTO on unpaired answers: rows with a label → set → cache → training, against a slow, obvious trainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.errors import ConfigError, DataError
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_samples
from tests.train.conftest import World, write_cache
from tests.train.reference import Reader, read_metrics, train_plainly
from tests.train.test_processes import run_two
from train.run import train

BETA = 0.1
CAPTURE = ("capture.mismatched=true", "capture.preset=reference", "capture.precision=exact")
WEIGHTS = ("loss.kind=kto", "loss.desirable_weight=0.5", "loss.undesirable_weight=1.5")


def unpaired(samples: list[Sample]) -> list[Sample]:
    """Two of three lose their rejected answer, the third its chosen one."""
    return [replace(s, chosen=None) if n % 3 == 2 else replace(s, rejected=None) for n, s in enumerate(samples)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 unpaired answers."""
    folder = tmp_path_factory.mktemp("judged") / "set"
    write_set(unpaired(tiny_samples(24, preference=True)), folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 12 unpaired answers and 12 pairs."""
    folder = tmp_path_factory.mktemp("mixed") / "set"
    samples = tiny_samples(24, preference=True)
    write_set([*unpaired(samples[:12]), *samples[12:]], folder)
    return folder


@pytest.mark.parametrize(("name", "micro", "sft"), [("judged", 8, 0.0), ("judged", 2, 0.3), ("mixed", 4, 0.0)])
def test_a_step_is_the_mean_over_samples(
    world: World, tmp_path: Path, request: pytest.FixtureRequest, name: str, micro: int, sft: float
) -> None:
    """TRL's KTOTrainer also takes the mean over its rows; a pair counts as the mean of its two answers."""
    data: Path = request.getfixturevalue(name)
    cache = write_cache(tmp_path / "cache", data, world.student, *CAPTURE)
    student, teacher = Reader(world.teacher, data), Reader(world.student, data)
    student.samples = SampleSet.open(data).with_mismatched()

    def loss_of_step(step: int) -> torch.Tensor:
        samples = student.step_samples(step, 8)

        def ratio(sample: Sample, role: str) -> torch.Tensor:
            with torch.no_grad():
                reference = teacher.answer(sample, role).target_log_probs_N.sum()
            return student.answer(sample, role).target_log_probs_N.sum() - reference

        with torch.no_grad():
            kl = torch.stack([ratio(sample, "mismatched") for sample in samples]).mean().clamp(min=0)
        total = torch.zeros(())
        for sample in samples:
            own = [role for role in sample.roles if role != "mismatched"]
            for role in own:
                r = ratio(sample, role)
                gain = BETA * (r - kl if role == "chosen" else kl - r)
                total = total + (0.5 if role == "chosen" else 1.5) * (1 - torch.sigmoid(gain)) / len(own)
            if "chosen" in own and sft:
                total = total - sft * student.answer(sample, "chosen").target_log_probs_N.mean()
        return total / len(samples)

    trained = student.freeze_all_but(".mlp.gate", ".mlp.up", ".mlp.down", "multi_modal_projector")
    losses, norms = train_plainly(trained, loss_of_step, steps=3, rate=3e-3)
    settings = (f"data.set={data}", f"cache.path={cache}", f"student.checkpoint={world.teacher}", *WEIGHTS)
    more = (f"loss.sft_weight={sft}", f"batch.micro_size={micro}", "steps=3", "optim.lr=3e-3")
    train(world.config("preference", tmp_path / "run", *settings, *more))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=2e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=2e-4)
    assert all("chosen_reward" in entry and "reward_margin" not in entry for entry in log)


def test_rows_with_labels_are_packed_captured_and_trained_on(world: World, tmp_path: Path) -> None:
    """Only answers that exist get records; the KL has one term per sample."""
    rows = [{"id": f"r{n}", "prompt": f"Count to {n}.", "completion": f"It is {n}.", "label": n < 6} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    summary = write_set(prepare_sources([tmp_path / "rows.json"]), tmp_path / "set")
    assert (summary.samples, summary.unpaired, summary.preferences, summary.conversations) == (8, 8, 0, 0)
    cache = write_cache(tmp_path / "cache", tmp_path / "set", world.teacher, *CAPTURE)
    opened = open_cache(cache)
    assert [len(opened.keys(role)) for role in ("chosen", "rejected", "mismatched")] == [6, 2, 8]
    settings = (f"data.set={tmp_path / 'set'}", f"cache.path={cache}", *WEIGHTS)
    train(
        world.config("preference", tmp_path / "run", *settings, "data.holdout=4", "eval_steps=2", "batch.global_size=4")
    )
    assert len(read_metrics(tmp_path / "run")) >= 4


@pytest.mark.parametrize("label", [True, False])
def test_answers_of_one_kind_alone(world: World, tmp_path: Path, label: bool) -> None:
    """Micro-batches, steps and whole caches may lack chosen or rejected answers; also with distillation."""
    pairs = tiny_samples(8, preference=True)
    halves = [replace(pair, rejected=None) if label else replace(pair, chosen=None) for pair in pairs]
    write_set(halves, tmp_path / "set")
    cache = write_cache(tmp_path / "cache", tmp_path / "set", world.teacher, "capture.mismatched=true")
    settings = (f"data.set={tmp_path / 'set'}", f"cache.path={cache}", "loss.kind=kto", "loss.distill_weight=0.5")
    train(world.config("preference", tmp_path / "run", *settings, "loss.sft_weight=0.1", "steps=2"))
    for entry in read_metrics(tmp_path / "run"):
        assert ("chosen_reward" in entry, "rejected_reward" in entry) == (label, not label)
        assert (entry["divergence"] > 0) == label


def test_losses_of_pairs_refuse_unpaired_answers(world: World, tmp_path: Path, judged: Path) -> None:
    cache = write_cache(tmp_path / "cache", judged, world.teacher, *CAPTURE[1:])
    settings = (f"data.set={judged}", f"cache.path={cache}")
    with pytest.raises(DataError, match=r"is an unpaired answer, from which only kto learns: set loss.kind to kto"):
        train(world.config("preference", tmp_path / "run", *settings))
    with pytest.raises(ConfigError, match=r"capture\.mismatched=true"):
        train(world.config("preference", tmp_path / "run", *settings, "loss.kind=kto"))
    with pytest.raises(DataError, match="is a preference, but the stage needs conversations"):
        train(world.config("sft", tmp_path / "run", f"data.set={judged}"))


@pytest.mark.slow
def test_two_processes_equal_one(world: World, tmp_path: Path, mixed: Path) -> None:
    """Even though they have different numbers of answers."""
    cache = write_cache(tmp_path / "cache", mixed, world.teacher, *CAPTURE)
    settings = [f"data.set={mixed}", f"cache.path={cache}", *WEIGHTS, "steps=10", "batch.micro_size=2"]
    done = run_two(world.config("preference", tmp_path / "two", *settings), tmp_path, "engine.zero_stage=0")
    assert done.returncode == 0, done.stderr
    train(world.config("preference", tmp_path / "one", *settings))
    logs = [read_metrics(tmp_path / name) for name in ("two", "one")]
    assert len(logs[0]) == len(logs[1]) == 10
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "kto_baseline", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        for name in ("chosen_reward", "rejected_reward"):  # about 0 at the start
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
