"""Preference distillation against a slow, obvious trainer whose teacher is in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.conftest import World
from tests.train.reference import Reader, train_plainly
from train.metrics import read_metrics
from train.run import train

BETA = 0.1


@pytest.mark.parametrize(("kind", "average"), [("kto_pair", False), ("kto_pair", True), ("sigmoid", False)])
@pytest.mark.parametrize("micro_size", [2, 8])
def test_a_step_is_one_mean_over_all_pairs(
    world: World, tmp_path: Path, kind: str, average: bool, micro_size: int
) -> None:
    """The KL terms of kto_pair are of the whole step, whatever the micro-batches, and carry no gradient."""
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
