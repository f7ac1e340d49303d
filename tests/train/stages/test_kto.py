"""Unpaired KTO against a slow, obvious trainer whose teacher is in memory, its KL measured on mismatched responses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError, TargetError
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_samples
from tests.train.conftest import World, write_cache
from tests.train.reference import Reader, read_metrics, train_plainly
from tests.train.test_processes import assert_equal_runs, run_two
from train.data.mismatched_check import check_pairs
from train.engine.deepspeed_engine import World as Processes
from train.run import train
from train.setup import prepare

BETA = 0.1
ONE = Processes(rank=0, size=1, local_size=1, device=torch.device("cpu"))
CAPTURE = ("capture.mismatched=true", "capture.preset=reference", "capture.precision=exact")


@pytest.fixture(scope="module")
def cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the pairs in three roles, with reference log-probs only."""
    return write_cache(tmp_path_factory.mktemp("kto") / "cache", world.pairs, world.teacher, *CAPTURE)


@pytest.mark.parametrize(
    ("average", "weights", "sft_weight", "micro_size", "zero_stage", "swapped"),
    [
        (False, (1.0, 1.0), 0.0, 2, 0, True),
        (True, (1.0, 1.5), 0.0, 8, 0, True),
        (False, (0.5, 1.0), 0.3, 4, 2, False),
        (True, (1.0, 0.0), 0.0, 8, 3, False),
    ],
)
def test_a_step_is_the_mean_of_single_responses_against_one_kl(
    world: World,
    tmp_path: Path,
    cache: Path,
    average: bool,
    weights: tuple[float, float],
    sft_weight: float,
    micro_size: int,
    zero_stage: int,
    swapped: bool,
) -> None:
    """KTO (arXiv 2402.01306), eq. 7 and 8, with the KL over the whole step's mismatched responses.

    `swapped`: student and teacher exchanged, so that K, which is clamped at 0, is positive.
    """
    checkpoint, teaching = (world.teacher, world.student) if swapped else (world.student, world.teacher)
    if swapped:
        cache = write_cache(tmp_path / "cache", world.pairs, teaching, *CAPTURE)
    student, teacher = Reader(checkpoint, world.pairs), Reader(teaching, world.pairs)
    student.samples = SampleSet.open(world.pairs).with_mismatched()
    seen: list[dict[str, torch.Tensor]] = []

    def loss_of_step(step: int) -> torch.Tensor:
        ratios: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": [], "mismatched": []}
        nll = []
        for sample in student.step_samples(step, 8):
            for role, found in ratios.items():
                log_probs_N = student.answer(sample, role).target_log_probs_N
                with torch.no_grad():
                    reference_N = teacher.answer(sample, role).target_log_probs_N
                difference = log_probs_N.sum() - reference_N.sum()
                found.append(difference / len(log_probs_N) if average else difference)
                if role == "chosen":
                    nll.append(-log_probs_N.mean())
        of = {role: torch.stack(found) for role, found in ratios.items()}
        kl = of["mismatched"].mean().clamp(min=0).detach()
        seen.append({**{role: ratios_B.detach() for role, ratios_B in of.items()}, "kl": kl})
        desirable = weights[0] * (1 - torch.sigmoid(BETA * (of["chosen"] - kl)))
        undesirable = weights[1] * (1 - torch.sigmoid(BETA * (kl - of["rejected"])))
        return torch.cat([desirable, undesirable]).mean() + sft_weight * torch.stack(nll).mean()

    trained = student.freeze_all_but(".mlp.gate", ".mlp.up", ".mlp.down", "multi_modal_projector")
    losses, norms = train_plainly(trained, loss_of_step, steps=3, rate=3e-3)
    settings = (
        f"cache.path={cache}",
        f"student.checkpoint={checkpoint}",
        "loss.kind=kto",
        f"loss.average_log_probs={average}",
        f"loss.desirable_weight={weights[0]}",
        f"loss.undesirable_weight={weights[1]}",
        f"loss.sft_weight={sft_weight}",
        f"batch.micro_size={micro_size}",
        f"engine.zero_stage={zero_stage}",
        "steps=3",
        "optim.lr=3e-3",
    )
    train(world.config("preference", tmp_path / "run", *settings))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=2e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=2e-4)
    assert any(float(of["kl"]) > 0 for of in seen) or not swapped
    for entry, of in zip(log, seen, strict=True):
        assert entry["kto_baseline"] == pytest.approx(float(of["kl"]), rel=1e-4, abs=1e-5)
        margins_B = BETA * (of["chosen"] - of["rejected"])
        assert entry["reward_accuracy"] == pytest.approx(float((margins_B > 0).float().mean()))
        assert entry["reward_margin"] == pytest.approx(float(margins_B.mean()), rel=1e-3, abs=1e-4)
        for role in ("chosen", "rejected"):
            rewards_B = BETA * of[role]
            assert entry[f"{role}_reward"]["mean"] == pytest.approx(float(rewards_B.mean()), rel=1e-3, abs=1e-4)
            assert entry[f"{role}_reward"]["max"] == pytest.approx(float(rewards_B.max()), rel=1e-3, abs=1e-4)


def test_gradient_checkpointing_changes_nothing(world: World, tmp_path: Path, cache: Path) -> None:
    """In a step of one micro-batch, which also runs the mismatched responses, with experts that drop tokens."""
    settings = [f"cache.path={cache}", "loss.kind=kto", "steps=3", "batch.micro_size=8", "batch.global_size=8"]
    settings += ["student.kind=sparse", "student.upcycle.num_experts=4", "student.capacity_factor=1.0"]
    for name in ("false", "true"):
        train(world.config("preference", tmp_path / name, *settings, f"engine.gradient_checkpointing={name}"))
    whole, again = (read_metrics(tmp_path / name) for name in ("false", "true"))
    for name in ("loss", "grad_norm", "kto_baseline"):
        assert [entry[name] for entry in again] == pytest.approx([entry[name] for entry in whole], rel=1e-6)


@pytest.mark.slow
def test_two_processes_equal_one(world: World, tmp_path: Path, cache: Path) -> None:
    """The KL is over all processes' mismatched responses, in training and on held-out samples."""
    settings = [f"cache.path={cache}", "loss.kind=kto", "steps=10", "batch.micro_size=2"]
    settings += ["data.holdout=4", "eval_steps=5"]
    done = run_two(world.config("preference", tmp_path / "two", *settings), tmp_path, "engine.zero_stage=0")
    assert done.returncode == 0, done.stderr
    train(world.config("preference", tmp_path / "one", *settings))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
    logs = [read_metrics(tmp_path / name) for name in ("one", "two")]
    assert [entry["kto_baseline"] for entry in logs[1]] == pytest.approx(
        [entry["kto_baseline"] for entry in logs[0]], rel=1e-5
    )


def test_what_does_not_fit_is_refused_before_the_first_step(world: World, tmp_path: Path, cache: Path) -> None:
    def refused(error: type[Exception], problem: str, *settings: str) -> None:
        with pytest.raises(error, match=problem) as caught:
            train(world.config("preference", tmp_path / "run", f"cache.path={cache}", *settings))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    refused(ConfigError, r"capture\.mismatched=true", "loss.kind=kto", f"cache.path={world.pairs_cache}")
    refused(ConfigError, r"loss.desirable_weight: not used with kto_pair", "loss.desirable_weight=2")
    both = ("loss.desirable_weight=0", "loss.undesirable_weight=0")
    refused(ConfigError, r"loss.desirable_weight: this and .* are both 0", "loss.kind=kto", *both)
    refused(ConfigError, r"loss.undesirable_weight is -1: must not be", "loss.kind=kto", "loss.undesirable_weight=-1")
    refused(DataError, "is a conversation, but the stage needs preferences", "loss.kind=kto", f"data.set={world.chats}")
    refused(ConfigError, r"loss.distill_weight: .* no distributions", "loss.kind=kto", "loss.distill_weight=0.5")


def test_a_set_that_pairs_otherwise_is_refused(world: World, tmp_path: Path, cache: Path) -> None:
    """The same samples except one: the sample that was paired with it now has another partner."""
    samples = tiny_samples(24, preference=True)
    paired = SampleSet.open(world.pairs).with_mismatched()
    texts = [str(paired.read(row).mismatched) for row in range(24)]
    gone = next(n for n, sample in enumerate(samples) if texts.count(sample.chosen or "") == 1)
    write_set([*samples[:gone], *samples[gone + 1 :]], tmp_path / "fewer")
    settings = (f"cache.path={cache}", f"data.set={tmp_path / 'fewer'}", "batch.global_size=23", "batch.micro_size=23")
    with pytest.raises(TargetError, match=r"\(mismatched\): its paired response differs from the cache's"):
        prepare(world.config("preference", tmp_path / "run", "loss.kind=kto", *settings), ONE)
    train(world.config("preference", tmp_path / "pairs", *settings, "steps=1"))  # the other losses ignore the pairing


def test_pairs_are_looked_at_before_anything_is_trained(world: World, tmp_path: Path, cache: Path) -> None:
    """A set in another order has the same pairs; an unknown pairing rule is refused by its name."""
    samples = tiny_samples(24, preference=True)
    write_set(samples[::-1], tmp_path / "reversed")
    encode = Reader(world.teacher, world.pairs).encoder.encode
    whole, half = SampleSet.open(tmp_path / "reversed"), write_set(samples[:12], tmp_path / "half").path
    rows = np.arange(24)
    opened = open_cache(cache)
    check_pairs(whole.with_mismatched(), opened, rows, encode)
    with pytest.raises(TargetError, match=r"\(mismatched\): its paired response .*: set data\.set to the captured set"):
        check_pairs(SampleSet.open(half).with_mismatched(), opened, rows[:12], encode)
    opened.fingerprint["capture"]["mismatched"] = "as it comes"
    with pytest.raises(ConfigError, match=r"loss\.kind: .* another pairing rule \(as it comes\)") as caught:
        check_pairs(SampleSet.open(world.pairs).with_mismatched(), opened, rows, encode)
    assert "\n" not in str(caught.value)


def test_a_sample_whose_mismatched_response_is_too_long_is_left_out(world: World, tmp_path: Path) -> None:
    """Its own text is short; the long text is its partner's, which is itself left out."""
    words = "red circle " * 290
    ask = (Turn("user", "Say it."),)
    long = Sample("long", ask, chosen=words, rejected=f"{words}!")
    short = [Sample(f"short-{n}", ask, chosen=f"It is {n}.", rejected=f"It is no {n}.") for n in range(8)]
    write_set([*short, long], tmp_path / "set")
    paired = SampleSet.open(tmp_path / "set").with_mismatched()
    partners = [sample.key for sample in map(paired.read, range(9)) if words in str(sample.mismatched)]
    assert len(partners) == 1
    cache = write_cache(tmp_path / "cache", tmp_path / "set", world.teacher, *CAPTURE)
    settings = (f"data.set={tmp_path / 'set'}", f"cache.path={cache}", "data.too_long=drop", "max_length=800")
    batch = ("batch.global_size=7", "batch.micro_size=7", "steps=1")
    summary = train(world.config("preference", tmp_path / "run", "loss.kind=kto", *settings, *batch))
    assert (summary.samples, summary.samples_too_long, summary.samples_without_record) == (7, 2, 0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"long", *partners}
