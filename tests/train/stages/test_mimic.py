"""Offline distillation equals distillation from a teacher in memory, and the balance loss is there once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llavamod_offline.models.checkpoint import load_llava
from llavamod_offline.models.upcycle import upcycle
from tests.train.conftest import World
from tests.train.reference import Reader, train_plainly
from train.metrics import read_metrics
from train.run import train


@pytest.mark.parametrize("kind", ["only_kd", "kd_lm"])
def test_offline_equals_the_live_teacher(world: World, tmp_path: Path, kind: str) -> None:
    """With every id recorded, losses and gradients are those of a loop that runs the teacher (another size) itself."""
    student, teacher = Reader(world.student, world.chats), Reader(world.teacher, world.chats)
    lm_weight = 0.5 if kind == "kd_lm" else 0.0

    def loss_of_step(step: int) -> torch.Tensor:
        losses = []
        for sample in student.step_samples(step, 8):
            with torch.no_grad():
                p_NV = teacher.answer(sample).log_probs_NV
            answer = student.answer(sample)
            kl_N = (p_NV.exp() * (p_NV - answer.log_probs_NV)).sum(-1)
            losses.append(kl_N - lm_weight * answer.target_log_probs_N)
        return torch.cat(losses).mean()

    trained = student.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    losses, norms = train_plainly(trained, loss_of_step, steps=6, rate=1e-3)
    train(world.config("mimic_dense", tmp_path / "run", "steps=6", f"loss.kind={kind}", "loss.lm_weight=0.5"))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    for entry in log:
        assert entry["kl"] + lm_weight * entry.get("cross_entropy", 0.0) == pytest.approx(entry["loss"], rel=1e-5)


def test_a_temperature_scales_as_t_squared(world: World, tmp_path: Path) -> None:
    student, teacher = Reader(world.student, world.chats), Reader(world.teacher, world.chats)
    losses = []
    with torch.no_grad():
        for sample in student.step_samples(0, 8):
            p_NV = (teacher.answer(sample).log_probs_NV / 2).log_softmax(-1)
            q_NV = (student.answer(sample).log_probs_NV / 2).log_softmax(-1)
            losses.append((p_NV.exp() * (p_NV - q_NV)).sum(-1))
    train(world.config("mimic_dense", tmp_path / "run", "steps=1", "loss.temperature=2.0"))
    expected = 4 * float(torch.cat(losses).mean())
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_is_added_once(world: World, tmp_path: Path) -> None:
    """Loss = divergence + cross-entropy + coefficient · balance, at a coefficient that would show a second one."""
    common = ("steps=2", "batch.micro_size=2", "loss.lm_weight=1.0")
    train(world.config("mimic_sparse", tmp_path / "with", *common, "loss.router_aux_coef=3.0"))
    train(world.config("mimic_sparse", tmp_path / "without", *common, "loss.router_aux_coef=0.0"))
    log, plain = read_metrics(tmp_path / "with"), read_metrics(tmp_path / "without")
    for entry in log:
        assert entry["balance"] >= 1.0
        expected = entry["divergence"] + entry["cross_entropy"] + 3.0 * entry["balance"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    assert log[0]["loss"] - plain[0]["loss"] == pytest.approx(3.0 * log[0]["balance"], rel=1e-4)
    for entry in (*log, *plain):
        assert len(entry["expert_load"]) == 1  # every other of two layers
        assert sum(entry["expert_load"][0]) == pytest.approx(1.0, rel=1e-5)
    weights = [load_llava(tmp_path / run / "student").state_dict() for run in ("with", "without")]
    router = next(name for name in weights[0] if name.endswith("mlp.gate.weight"))
    assert not torch.equal(weights[0][router], weights[1][router])


def test_dense_to_sparse_trains_what_the_original_trains(world: World, tmp_path: Path) -> None:
    """Experts, the other layers' MLPs, routers and the projector; attention, norms, embeddings and tower stay."""
    config = world.config("mimic_sparse", tmp_path / "run", "steps=2")
    before = upcycle(load_llava(world.student), layers="sparse", num_experts=4, top_k=2, seed=0).state_dict()
    summary = train(config)
    after = load_llava(Path(summary.student)).state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for name in before:
        empty = before[name].numel() == 0 or "shared_expert_gate" in name
        trained = not empty and "vision_tower" not in name and (".mlp." in name or "multi_modal_projector" in name)
        assert (name in changed) == trained, name
    assert summary.activated_parameters < summary.parameters


def test_a_sparse_student_goes_on_as_it_is(world: World, tmp_path: Path) -> None:
    first = train(world.config("mimic_sparse", tmp_path / "first", "steps=1"))
    settings = (f"student.checkpoint={first.student}", "student.upcycle=null", "steps=1")
    second = train(world.config("mimic_sparse", tmp_path / "second", *settings))
    assert second.parameters == first.parameters
    assert read_metrics(tmp_path / "second")[0]["loss"] < read_metrics(tmp_path / "first")[0]["loss"]
