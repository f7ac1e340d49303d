"""Offline distillation equals distillation from a teacher in memory, and the balance loss is added once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.models.upcycle import upcycle
from tests.tiny import write_tiny_llava
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader, read_metrics, train_plainly
from train.run import train


def _divergence(name: str, p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
    """Each position's divergence, from both models' log-probs over the whole vocabulary."""

    def kl(x_NV: torch.Tensor, y_NV: torch.Tensor) -> torch.Tensor:
        return (x_NV.exp() * (x_NV - y_NV)).sum(-1)

    def mixture(weight: float) -> torch.Tensor:
        return (weight * p_NV.exp() + (1 - weight) * q_NV.exp()).log()

    return {
        "forward_kl": lambda: kl(p_NV, q_NV),
        "reverse_kl": lambda: kl(q_NV, p_NV),
        "js": lambda: 0.3 * kl(p_NV, mixture(0.3)) + 0.7 * kl(q_NV, mixture(0.3)),
        "skewed_forward_kl": lambda: kl(p_NV, mixture(0.2)),
        "skewed_reverse_kl": lambda: kl(q_NV, mixture(0.8)),
        "total_variation": lambda: (p_NV.exp() - q_NV.exp()).abs().sum(-1) / 2,
    }[name]()


def _train_live(
    world: World, steps: int, *, divergence: str = "forward_kl", lm_weight: float = 0.0
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop that runs the teacher (of another size) itself."""
    student, teacher = Reader(world.student, world.chats), Reader(world.teacher, world.chats)
    said: dict[str, torch.Tensor] = {}

    def loss_of_step(step: int) -> torch.Tensor:
        losses = []
        for sample in student.step_samples(step, 8):
            if sample.key not in said:
                with torch.no_grad():
                    said[sample.key] = teacher.answer(sample).log_probs_NV
            answer = student.answer(sample)
            divergence_N = _divergence(divergence, said[sample.key], answer.log_probs_NV)
            losses.append(divergence_N - lm_weight * answer.target_log_probs_N)
        return torch.cat(losses).mean()

    trained = student.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    return train_plainly(trained, loss_of_step, steps=steps, rate=1e-3)


@pytest.mark.slow
def test_offline_equals_the_live_teacher_for_fifty_steps(world: World, tmp_path: Path) -> None:
    """With every id recorded, losses and gradients are those of distillation with the teacher in memory."""
    losses, norms = _train_live(world, 50)
    assert losses[-1] < 0.5 * losses[0]
    train(world.config("mimic_dense", tmp_path / "run", "steps=50"))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("micro_size", [2, 8])
def test_all_positions_are_imitated_and_the_cross_entropy_is_of_the_answers(
    world: World, tmp_path: Path, micro_size: int
) -> None:
    """The divergence is a mean over all tokens, image tokens included; the cross-entropy over the supervised ones."""
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, *EXHAUSTIVE, "capture.positions=all")
    student, teacher = Reader(world.student, world.chats), Reader(world.teacher, world.chats)

    def loss_of_step(step: int) -> torch.Tensor:
        divergences, crosses = [], []
        for sample in student.step_samples(step, 8):
            with torch.no_grad():
                said_TV = teacher.answer(sample).all_log_probs_TV
            answer = student.answer(sample)
            divergences.append(_divergence("forward_kl", said_TV, answer.all_log_probs_TV))
            crosses.append(-answer.target_log_probs_N)
        return torch.cat(divergences).mean() + 0.5 * torch.cat(crosses).mean()

    trained = student.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    losses, norms = train_plainly(trained, loss_of_step, steps=4, rate=1e-3)
    settings = ("loss.kind=kd_lm", "loss.lm_weight=0.5", f"cache.path={cache}", f"batch.micro_size={micro_size}")
    train(world.config("mimic_dense", tmp_path / "run", *settings))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    for entry in log:
        assert entry["kl"] + 0.5 * entry["cross_entropy"] == pytest.approx(entry["loss"], rel=1e-5)


def test_cross_entropy_is_added_by_its_weight(world: World, tmp_path: Path) -> None:
    losses, norms = _train_live(world, 4, lm_weight=0.5)
    train(world.config("mimic_dense", tmp_path / "run", "loss.kind=kd_lm", "loss.lm_weight=0.5"))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    for entry in log:
        assert entry["kl"] + 0.5 * entry["cross_entropy"] == pytest.approx(entry["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ("reverse_kl",),
        ("js", "loss.js_weight=0.3"),
        ("skewed_forward_kl", "loss.skew=0.2"),
        ("skewed_reverse_kl", "loss.skew=0.2"),
        ("total_variation",),
    ],
)
def test_every_divergence_equals_the_live_teachers(world: World, tmp_path: Path, settings: tuple[str, ...]) -> None:
    losses, norms = _train_live(world, 3, divergence=settings[0])
    train(world.config("mimic_dense", tmp_path / "run", "steps=3", f"loss.divergence={settings[0]}", *settings[1:]))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    assert [entry["divergence"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert all(entry["kl"] > 0 for entry in log)


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


def test_a_temperature_the_cache_was_not_captured_with_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.temperature: cache .* supports temperatures 1, 1.5, 2, 4, not 3"):
        train(world.config("mimic_dense", tmp_path / "run", "loss.temperature=3.0"))
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, "capture.temperatures=[]")
    with pytest.raises(ConfigError, match=r"choose one of these, or capture again with capture.temperature=2"):
        train(world.config("mimic_dense", tmp_path / "run", "loss.temperature=2.0", f"cache.path={cache}"))
    assert not (tmp_path / "run").exists()


def test_the_balance_loss_is_added_once(world: World, tmp_path: Path) -> None:
    """Loss = divergence + cross-entropy + coefficient · balance, with a coefficient that would expose a second one."""
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


def test_capacity_drops_in_training_and_not_in_evaluation(world: World, tmp_path: Path) -> None:
    common = ("steps=1", "optim.lr=1e-9", "data.holdout=8", "eval_steps=1")
    for name, factor in (("tight", "0.5"), ("roomy", "2.0"), ("free", "null")):
        train(world.config("mimic_sparse", tmp_path / name, *common, f"student.capacity_factor={factor}"))
    tight, roomy, free = (read_metrics(tmp_path / name)[0] for name in ("tight", "roomy", "free"))
    assert tight["drop_rate"][0] > 0.45  # half the capacity, rounded up in every micro-batch
    assert roomy["drop_rate"] == free["drop_rate"] == [0.0]  # 4 experts, 2 choices: 2.0 has room for all
    assert roomy["loss"] == free["loss"] != tight["loss"]
    assert tight["holdout_loss"] == pytest.approx(free["holdout_loss"], rel=1e-5)


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


def test_a_student_over_llama_becomes_a_mixtral_with_noise_until_it_is_saved(world: World, tmp_path: Path) -> None:
    """Router noise is random but the same in each run; plain transformers reads the student without it."""
    dense = write_tiny_llava(tmp_path / "dense", text_config=LlamaConfig)
    settings = [f"student.checkpoint={dense}", "student.upcycle.layers=dense", "steps=3"]
    settings += ["student.upcycle.num_experts=[4,4]", "student.upcycle.expert_noise=0.02"]
    losses, students = [], []
    for name, noise in (("quiet", 0.0), ("noisy", 1.0), ("again", 1.0)):
        config = world.config("mimic_sparse", tmp_path / name, *settings, f"student.upcycle.router_noise={noise}")
        students.append(train(config).student)
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
    assert losses[0] != losses[1] == losses[2]
    assert AutoModelForImageTextToText.from_pretrained(students[1]).config.text_config.model_type == "mixtral"


def test_a_sparse_student_goes_on_as_it_is(world: World, tmp_path: Path) -> None:
    first = train(world.config("mimic_sparse", tmp_path / "first", "steps=1"))
    settings = (f"student.checkpoint={first.student}", "student.upcycle=null", "steps=1")
    second = train(world.config("mimic_sparse", tmp_path / "second", *settings))
    assert second.parameters == first.parameters
    assert read_metrics(tmp_path / "second")[0]["loss"] < read_metrics(tmp_path / "first")[0]["loss"]
