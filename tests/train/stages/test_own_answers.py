"""Losses on answers that a student wrote, against a slow loop that runs the teacher itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Generated, Sample
from llavamod_offline.errors import ConfigError, DataError
from tests.tiny import tiny_samples
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Answer, Reader, read_metrics, train_plainly
from train.run import train

Alter = Callable[[tuple[float, ...]], tuple[float, ...] | None]


def write_own(
    world: World,
    folder: Path,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    alter: Alter = lambda log_probs: log_probs,
) -> Path:
    """The world's samples as if a student had written their answers; every third one is tokenised differently."""
    reader, made = Reader(world.student, world.chats), []
    rng = np.random.default_rng(0)
    for number, sample in enumerate(tiny_samples(24)):
        count = len(reader.encoder.encode(sample, "response").supervised_N)
        log_probs = alter(tuple(-rng.exponential(1.0, _last_turn(reader, sample, count)).round(3)))
        generated = Generated("w", "s", sample.key, "last", temperature, top_p, 99, 0, 1, (log_probs,))
        if number % 3 == 1:
            generated = dataclasses.replace(generated, behaviour_log_probs=(None,))
        made.append(dataclasses.replace(sample, generated=generated))
    about = {"temperature": temperature, "top_p": top_p, "round": 1}
    write_set(made, folder, generated={"teacher": {}, "generate": about})
    return folder


def _last_turn(reader: Reader, sample: Sample, count: int) -> int:
    before = [turn for turn in sample.turns[:-1] if turn.role == "assistant"]
    if not before:
        return count
    cut = dataclasses.replace(sample, turns=sample.turns[:-2])
    return count - len(reader.encoder.encode(cut, "response").supervised_N)


def written(sample: Sample, answer: Answer, masked: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of the written tokens that are learnt from, and the writer's log-probs of them."""
    assert sample.generated is not None
    (log_probs,) = sample.generated.behaviour_log_probs
    if log_probs is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    places = torch.arange(len(answer.target_ids_N))[-len(log_probs) :]
    kept = answer.target_ids_N[places] != masked if masked is not None else torch.ones(len(places), dtype=torch.bool)
    return places[kept], torch.tensor(log_probs)[kept]


def live(
    world: World,
    data: Path,
    of_token: Callable[[Answer, Answer, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    mask: bool,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms with the teacher in memory; each step is a mean over the tokens learnt from."""
    student, teacher = Reader(world.student, data), Reader(world.teacher, data)
    masked = student.encoder.end_id if mask else None

    def loss_of_step(step: int) -> torch.Tensor:
        losses = []
        for sample in student.step_samples(step, 8):
            with torch.no_grad():
                said = teacher.answer(sample)
            answer = student.answer(sample)
            losses.append(of_token(answer, said, *written(sample, answer, masked)))
        return torch.cat(losses).mean()

    trained = student.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    return train_plainly(trained, loss_of_step, steps=3, rate=1e-3)


def policy(answer: Answer, said: Answer, places: torch.Tensor, behaviour: torch.Tensor) -> torch.Tensor:
    student, teacher = answer.target_log_probs_N[places], said.target_log_probs_N[places]
    weight = (student - behaviour).exp().clamp(max=1.5).detach()
    score = weight * (student - teacher).detach()
    return score + score * (student - student.detach())


def reverse(answer: Answer, said: Answer, places: torch.Tensor, behaviour: torch.Tensor) -> torch.Tensor:
    q_WV, p_WV = answer.log_probs_NV[places], said.log_probs_NV[places]
    return (q_WV.exp() * (q_WV - p_WV)).sum(-1)


POLICY = ("loss.kind=policy_gradient", "loss.importance_max=1.5")
REVERSE = ("loss.divergence=reverse_kl", "loss.positions=written")


@pytest.mark.parametrize(
    ("of_token", "settings", "capture", "mask"),
    [
        (policy, POLICY, ("capture.preset=reference", "capture.precision=exact"), False),
        (policy, (*POLICY, "loss.special_tokens=mask"), EXHAUSTIVE, True),
        (policy, POLICY, (*EXHAUSTIVE, "capture.positions=all"), False),
        (reverse, REVERSE, EXHAUSTIVE, False),
        (reverse, (*REVERSE, "loss.special_tokens=mask"), (*EXHAUSTIVE, "capture.positions=all"), True),
    ],
)
@pytest.mark.parametrize("micro_size", [2, 8])
def test_losses_and_gradients_are_those_of_a_live_teacher(
    world: World,
    tmp_path: Path,
    of_token: Callable[..., torch.Tensor],
    settings: tuple[str, ...],
    capture: tuple[str, ...],
    mask: bool,
    micro_size: int,
) -> None:
    """Only written tokens count, whatever the micro-batches, in caches of response positions or all."""
    data = write_own(world, tmp_path / "own")
    cache = write_cache(tmp_path / "cache", data, world.teacher, *capture)
    losses, norms = live(world, data, of_token, mask=mask)
    given = (f"data.set={data}", f"cache.path={cache}", "steps=3", f"batch.micro_size={micro_size}", *settings)
    train(world.config("mimic_dense", tmp_path / "run", *given))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-4)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-3)


def test_a_step_with_nothing_to_learn_from_changes_nothing(world: World, tmp_path: Path) -> None:
    reader = Reader(world.student, world.chats)
    data, made = tmp_path / "own", []
    for number, sample in enumerate(tiny_samples(4)):
        answer = _last_turn(reader, sample, len(reader.encoder.encode(sample, "response").supervised_N))
        own = (-1.0,) * answer if number == 2 else None
        made.append(dataclasses.replace(sample, generated=Generated("w", "s", "k", "last", 1.0, 1.0, 99, 0, 1, (own,))))
    write_set(made, data, generated={"teacher": {}, "generate": {"temperature": 1.0}})
    cache = write_cache(tmp_path / "cache", data, world.teacher)
    each = (f"data.set={data}", f"cache.path={cache}", "batch.global_size=1", "batch.micro_size=1", "steps=4")
    for name, settings in (("policy", POLICY), ("reverse", REVERSE)):
        train(world.config("mimic_dense", tmp_path / name, *each, *settings))
        log = read_metrics(tmp_path / name)
        assert sorted(entry["loss"] == 0.0 for entry in log) == [False, True, True, True]
        assert all((entry["positions"] == 0) == (entry["loss"] == 0.0) for entry in log)
        assert sorted(entry["covered_share"] for entry in log)[:3] == [0.0] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (POLICY, "loss.kind: policy_gradient needs answers that the student wrote"),
        (REVERSE, "loss.positions: written needs answers that the student wrote"),
        (("loss.kind=kd_lm", "loss.positions=written"), "kd_lm would teach a student its own answers"),
        (("loss.special_tokens=mask",), "loss.special_tokens: not used without written answers"),
        (("loss.importance_max=3",), "loss.importance_max: not used with only_kd"),
        ((*POLICY, "loss.divergence=js"), "loss.divergence: not used with policy_gradient"),
        ((*POLICY, "loss.temperature=2"), "loss.temperature: not used with policy_gradient"),
        ((*POLICY, "loss.positions=response"), "loss.positions: policy_gradient learns from written answers alone"),
        (("loss.kind=policy_gradient", "loss.importance_max=0"), "loss.importance_max is 0: must be above 0"),
    ],
)
def test_what_does_not_fit_is_one_line(world: World, tmp_path: Path, settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        train(world.config("mimic_dense", tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()


def test_sets_without_usable_log_probs_are_one_line(world: World, tmp_path: Path) -> None:
    def run(name: str) -> None:
        cache = write_cache(tmp_path / f"{name}-cache", tmp_path / name, world.teacher)
        given = (f"data.set={tmp_path / name}", f"cache.path={cache}", *POLICY)
        train(world.config("mimic_dense", tmp_path / f"{name}-run", *given))

    write_own(world, tmp_path / "greedy", temperature=0.0)
    with pytest.raises(ConfigError, match=r"needs sampled answers, but those of set .* are greedy"):
        run("greedy")
    write_own(world, tmp_path / "nucleus", top_p=0.9)
    with pytest.raises(ConfigError, match=r"needs answers drawn from all tokens, but those .* generate.top_p=0.9"):
        run("nucleus")
    write_own(world, tmp_path / "stopped", alter=lambda log_probs: None)
    with pytest.raises(ConfigError, match=r"nothing can be learnt from set .*stopped'"):
        run("stopped")
    write_own(world, tmp_path / "none", alter=lambda log_probs: ())
    with pytest.raises(DataError, match=r"log-probs of 0 tokens for an answer of \d+"):
        run("none")
    write_own(world, tmp_path / "short", alter=lambda log_probs: log_probs[:-1])
    with pytest.raises(
        DataError, match=r"sample '.*': log-probs of \d+ tokens for an answer of \d+: it was written with"
    ):
        run("short")
    old = [
        dataclasses.replace(sample, generated=Generated("w", "s", "k", "last", 1.0, 1.0, 99, 0))
        for sample in tiny_samples(8)
    ]
    write_set(old, tmp_path / "old", generated={"teacher": {}, "generate": {"temperature": 1.0}})
    with pytest.raises(DataError, match="the set has no log-probs from the writer of its answers: write the set again"):
        run("old")
