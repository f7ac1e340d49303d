"""Preference distillation against a slow, obvious trainer whose teacher is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel

from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader, read_metrics, train_plainly
from train.run import train

BETA = 0.1


@pytest.mark.parametrize(("kind", "average"), [("kto_pair", False), ("kto_pair", True), ("sigmoid", False)])
@pytest.mark.parametrize("micro_size", [2, 8])
def test_a_step_is_one_mean_over_all_pairs(
    world: World, tmp_path: Path, kind: str, average: bool, micro_size: int
) -> None:
    """The KL terms of kto_pair are over the whole step, whatever the micro-batches, and carry no gradient."""
    student, teacher = Reader(world.student, world.pairs), Reader(world.teacher, world.pairs)
    rewards: list[torch.Tensor] = []

    def loss_of_step(step: int) -> torch.Tensor:
        ratios: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
        for sample in student.step_samples(step, 8):
            for role, found in ratios.items():
                log_probs_N = student.answer(sample, role).target_log_probs_N
                with torch.no_grad():
                    reference_N = teacher.answer(sample, role).target_log_probs_N
                difference = log_probs_N.sum() - reference_N.sum()
                found.append(difference / len(log_probs_N) if average else difference)
        chosen_B, rejected_B = (torch.stack(found) for found in ratios.values())
        rewards.append(BETA * torch.stack([chosen_B, rejected_B]).detach())
        if kind == "sigmoid":
            return -torch.nn.functional.logsigmoid(BETA * (chosen_B - rejected_B)).mean()
        kl_chosen, kl_rejected = (x.mean().clamp(min=0).detach() for x in (chosen_B, rejected_B))
        losses = [
            1 - torch.sigmoid(BETA * (chosen_B - kl_rejected)),
            1 - torch.sigmoid(BETA * (kl_chosen - rejected_B)),
        ]
        return torch.cat(losses).mean()

    trained = student.freeze_all_but(".mlp.gate", ".mlp.up", ".mlp.down", "multi_modal_projector")
    losses, norms = train_plainly(trained, loss_of_step, steps=3, rate=3e-3)
    settings = (f"loss.kind={kind}", f"loss.average_log_probs={average}", f"batch.micro_size={micro_size}", "steps=3")
    train(world.config("preference", tmp_path / "run", *settings, "optim.lr=3e-3"))
    if kind == "kto_pair":  # some KL terms are not clamped to 0
        assert any(bool((rewards_2B.mean(1) > 0).any()) for rewards_2B in rewards)
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=2e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=2e-4)
    for entry, rewards_2B in zip(log, rewards, strict=True):
        for role, rewards_B in zip(("chosen_reward", "rejected_reward"), rewards_2B, strict=True):
            assert entry[role]["mean"] == pytest.approx(float(rewards_B.mean()), rel=1e-3, abs=1e-4)
            assert entry[role]["min"] == pytest.approx(float(rewards_B.min()), rel=1e-3, abs=1e-4)
            assert entry[role]["p50"] == pytest.approx(float(rewards_B.quantile(0.5)), rel=1e-3, abs=1e-4)
        margins_B = rewards_2B[0] - rewards_2B[1]
        assert entry["reward_accuracy"] == pytest.approx(float((margins_B > 0).float().mean()))
        assert entry["reward_margin"] == pytest.approx(float(margins_B.mean()), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def exhaustive(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the pairs that records every id."""
    return write_cache(tmp_path_factory.mktemp("pairs") / "cache", world.pairs, world.teacher, *EXHAUSTIVE)


@pytest.mark.parametrize(
    ("kind", "average", "sft_weight", "distill_weight", "divergence", "micro_size", "zero_stage"),
    [
        ("kto_pair", False, 0.3, 0.0, "forward_kl", 2, 0),
        ("sigmoid", True, 0.0, 0.7, "forward_kl", 8, 0),
        ("ipo", True, 0.3, 0.7, "reverse_kl", 4, 0),
        ("hinge", False, 0.3, 0.7, "forward_kl", 2, 3),
    ],
)
def test_terms_on_the_chosen_response_are_means_over_its_tokens(
    world: World,
    tmp_path: Path,
    exhaustive: Path,
    kind: str,
    average: bool,
    sft_weight: float,
    distill_weight: float,
    divergence: str,
    micro_size: int,
    zero_stage: int,
) -> None:
    """Short and long responses count equally, whatever the micro-batches; the plain loop has the teacher in memory."""
    student, teacher = Reader(world.student, world.pairs), Reader(world.teacher, world.pairs)
    parts: list[tuple[float, float]] = []

    def loss_of_step(step: int) -> torch.Tensor:
        ratios: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
        nll, distance = [], []
        for sample in student.step_samples(step, 8):
            for role, found in ratios.items():
                ours = student.answer(sample, role)
                with torch.no_grad():
                    theirs = teacher.answer(sample, role)
                difference_N = ours.target_log_probs_N - theirs.target_log_probs_N
                found.append(difference_N.mean() if average else difference_N.sum())
                if role == "chosen":
                    nll.append(-ours.target_log_probs_N.mean())
                    p_NV, q_NV = theirs.log_probs_NV, ours.log_probs_NV
                    if divergence == "reverse_kl":
                        p_NV, q_NV = q_NV, p_NV
                    distance.append((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean())
        chosen_B, rejected_B = (torch.stack(found) for found in ratios.values())
        difference_B = chosen_B - rejected_B
        if kind == "sigmoid":
            losses_B = -torch.nn.functional.logsigmoid(BETA * difference_B)
        elif kind == "ipo":
            losses_B = (difference_B - 1 / (2 * BETA)) ** 2
        elif kind == "hinge":
            losses_B = (1 - BETA * difference_B).relu()
        else:
            kl_chosen, kl_rejected = (x.mean().clamp(min=0).detach() for x in (chosen_B, rejected_B))
            losses_B = 1 - torch.sigmoid(BETA * (chosen_B - kl_rejected)) / 2
            losses_B = losses_B - torch.sigmoid(BETA * (kl_chosen - rejected_B)) / 2
        nll_mean, distance_mean = torch.stack(nll).mean(), torch.stack(distance).mean()
        parts.append((nll_mean.item(), distance_mean.item()))
        return losses_B.mean() + sft_weight * nll_mean + distill_weight * distance_mean

    trained = student.freeze_all_but(".mlp.gate", ".mlp.up", ".mlp.down", "multi_modal_projector")
    losses, norms = train_plainly(trained, loss_of_step, steps=3, rate=3e-3)
    settings = (
        f"cache.path={exhaustive}",
        f"loss.kind={kind}",
        f"loss.average_log_probs={average}",
        f"loss.sft_weight={sft_weight}",
        f"loss.distill_weight={distill_weight}",
        f"loss.divergence={divergence}",
        f"batch.micro_size={micro_size}",
        f"engine.zero_stage={zero_stage}",
        "steps=3",
        "optim.lr=3e-3",
    )
    train(world.config("preference", tmp_path / "run", *settings))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=2e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=2e-4)
    for entry, (nll, distance) in zip(log, parts, strict=True):
        assert ("chosen_nll" in entry) == bool(sft_weight)
        assert ("divergence" in entry) == bool(distill_weight)
        assert entry.get("chosen_nll", nll) == pytest.approx(nll, rel=1e-4)
        assert entry.get("divergence", distance) == pytest.approx(distance, rel=1e-4)
        total = entry["preference"] + sft_weight * nll + distill_weight * distance
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_a_sparse_student_balances_both_responses_together(world: World, tmp_path: Path) -> None:
    sparse = train(world.config("mimic_sparse", tmp_path / "sparse", "steps=1"))
    settings = (
        f"student.checkpoint={sparse.student}",
        "student.kind=sparse",
        "loss.router_aux_coef=2.0",
        "trainable=[projector,mlp,router]",
        "steps=1",
    )
    train(world.config("preference", tmp_path / "run", *settings))
    entry = read_metrics(tmp_path / "run")[0]
    assert 0 < entry["loss"] - 2.0 * entry["balance"] < 1  # the mean of kto_pair's terms, each between 0 and 1
    assert sum(entry["expert_load"][0]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("kind", ["kto_pair", "kto", "sigmoid"])
@pytest.mark.parametrize("micro_size", [2, 8])
def test_the_tower_sees_each_picture_of_a_step_once(
    world: World, tmp_path: Path, kind: str, micro_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever looks ahead, and in however many roles; in a step that trains the tower, it runs as often as it must."""
    settings = [f"loss.kind={kind}", f"batch.micro_size={micro_size}", "steps=2"]
    if kind == "kto":
        capture = ("capture.mismatched=true", "capture.preset=reference")
        settings.append(f"cache.path={write_cache(tmp_path / 'cache', world.pairs, world.teacher, *capture)}")
    seen: list[int] = []
    run_tower = CLIPVisionModel.forward

    def count(tower: CLIPVisionModel, pixel_values: torch.Tensor, **settings: Any) -> Any:
        seen.append(len(pixel_values))
        return run_tower(tower, pixel_values, **settings)

    monkeypatch.setattr(CLIPVisionModel, "forward", count)
    train(world.config("preference", tmp_path / "run", *settings))
    reader = Reader(world.student, world.pairs)
    images = sum(len(sample.images) for step in range(2) for sample in reader.step_samples(step, 8))
    assert sum(seen) == images
    if kind == "sigmoid":
        return
    seen.clear()
    trainable = ("trainable=[vision,projector]", "optim.lr=1e-9")
    train(world.config("preference", tmp_path / "vision", *settings, *trainable))
    frozen, trained = (read_metrics(tmp_path / name)[0]["loss"] for name in ("run", "vision"))
    assert trained == frozen
    assert sum(seen) == images * (1 if (kind, micro_size) == ("kto_pair", 8) else 2)
