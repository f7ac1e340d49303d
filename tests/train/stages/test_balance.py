"""A step's router balance loss, against DeepSpeed's own top-2 gate, on samples of unequal lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.families.llava.forward import student_hidden_states
from tests.train.conftest import World
from tests.train.reference import Reader, read_metrics
from train.config.train import StudentConfig
from train.run import train
from train.student.make import make_student


def _mixed_set(folder: Path) -> Path:
    """Long questions with short answers, and the reverse, so that answers and tokens weight samples differently."""
    samples = []
    for number in range(8):
        texts = [" ".join(["red blue green circle"] * (1 + number)), "yes"]
        question, answer = texts if number % 2 else reversed(texts)
        samples.append(Sample(f"mixed-{number}", (Turn("user", question), Turn("assistant", answer)), (), ()))
    write_set(samples, folder)
    return folder


def _gate_losses(config: StudentConfig, reader: Reader) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each sample of the first step: DeepSpeed's gate losses summed over layers, tokens, answer positions."""
    from deepspeed.moe.sharded_moe import top2gating

    student = make_student(config, seed=0)
    gates = [layer.mlp.gate for layer in student.model.language_model.layers[::2]]
    losses, tokens, answers = [], [], []
    logits: list[Tensor] = []
    for gate in gates:
        gate.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    for sample in reader.step_samples(0, 8):
        logits.clear()
        sequence = reader.encoder.encode(sample, "response")
        ids_1T = torch.from_numpy(sequence.input_ids_T)[None]
        student_hidden_states(student, ids_1T, torch.ones_like(ids_1T))
        # With all choices kept and no noise in the second choice, only l_aux, the first result, matters here.
        found = [top2gating(each, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False)[0] for each in logits]
        losses.append(torch.stack(found).sum())
        tokens.append(ids_1T.shape[1])
        answers.append(len(sequence.supervised_N))
    return torch.stack(losses), torch.tensor(tokens), torch.tensor(answers), gates[0].weight


def test_micro_batches_count_by_the_tokens_they_route(world: World, tmp_path: Path) -> None:
    """Value and gradient: at step 0 all experts are equal, so nothing else moves the routers."""
    data = _mixed_set(tmp_path / "set")
    config = world.config(
        "sft",
        tmp_path / "run",
        f"data.set={data}",
        "steps=1",
        "batch.micro_size=1",
        "student.kind=sparse",
        "student.upcycle={layers: sparse, num_experts: 4, top_k: 2}",
        "trainable=[router]",
        "loss.router_aux_coef=2.0",
    )
    train(config)
    entry = read_metrics(tmp_path / "run")[0]
    losses_S, tokens_S, answers_S, weight_ED = _gate_losses(config.student, Reader(world.student, data))
    expected, by_answers = ((losses_S * counts_S).sum() / counts_S.sum() for counts_S in (tokens_S, answers_S))
    assert entry["balance"] == pytest.approx(expected.item(), rel=1e-5)
    assert by_answers.item() != pytest.approx(expected.item(), rel=5e-4)  # the samples distinguish these two weightings
    gradient_ED = torch.autograd.grad(2.0 * expected, weight_ED)[0]
    assert entry["grad_norm"] == pytest.approx(float(gradient_ED.norm()), rel=1e-4)


def test_a_sparse_run_ends_with_its_loss_under_random_routing(world: World, tmp_path: Path) -> None:
    """Without the balance loss; over held-out samples, or else the last step's. With equal experts it is unchanged."""
    common = ("steps=2", "loss.router_aux_coef=0.5")
    held = ("data.holdout=8", "eval_steps=1")
    train(world.config("mimic_sparse", tmp_path / "equal", *common, "optim.lr=1e-9"))
    train(world.config("mimic_sparse", tmp_path / "trained", *common, *held, "optim.lr=3e-2"))
    train(world.config("mimic_dense", tmp_path / "dense", "steps=2"))
    equal, trained, dense = (read_metrics(tmp_path / name) for name in ("equal", "trained", "dense"))
    names = {"own_routing_loss", "random_routing_loss"}
    assert names <= equal[1].keys()
    assert names <= trained[1].keys()
    assert not names & (equal[0].keys() | trained[0].keys() | dense[1].keys())
    assert equal[1]["random_routing_loss"] == pytest.approx(equal[1]["own_routing_loss"], rel=1e-6)
    assert trained[1]["random_routing_loss"] != pytest.approx(trained[1]["own_routing_loss"], rel=1e-3)
    without_balance = trained[1]["holdout_loss"] - 0.5 * trained[1]["holdout_balance"]
    assert trained[1]["own_routing_loss"] == pytest.approx(without_balance, rel=1e-5)
