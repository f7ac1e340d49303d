"""The policy-gradient form against a dense loop, and against the gradient of the reverse KL that it estimates."""

from __future__ import annotations

import math

import pytest
import torch

from llavamod_offline.errors import TargetError
from llavamod_offline.losses import policy_gradient, sequence_log_probs_from_hidden
from tests.llavamod_offline.losses.reference import random_teacher


def drawn(log_probs_NV: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_probs_NV.exp(), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("importance_max", [0.8, 2.0, math.inf])
def test_value_and_gradient_are_those_of_a_loop_over_dense_distributions(importance_max: float) -> None:
    count, vocab = 40, 11
    teacher_NV, behaviour_NV = random_teacher(count, vocab, 1), random_teacher(count, vocab, 2)
    ids_N = drawn(behaviour_NV, 3)
    generator = torch.Generator().manual_seed(4)
    logits_NV = torch.randn(count, vocab, generator=generator, dtype=torch.float64).requires_grad_()

    value, clipped = 0.0, 0
    gradient_NV = torch.zeros(count, vocab, dtype=torch.float64)
    for n, y in enumerate(ids_N.tolist()):
        q_V = logits_NV[n].detach().softmax(0)
        advantage = float(teacher_NV[n, y] - q_V[y].log())
        ratio = float(q_V[y] / behaviour_NV[n, y].exp())
        weight, clipped = min(ratio, importance_max), clipped + (ratio > importance_max)
        value -= weight * advantage
        for v in range(vocab):
            gradient_NV[n, v] = -weight * advantage * (float(v == y) - q_V[v])

    def of(log_probs_NV: torch.Tensor) -> torch.Tensor:
        return log_probs_NV.gather(1, ids_N[:, None])[:, 0]

    terms = policy_gradient(
        of(logits_NV.log_softmax(-1)), of(teacher_NV), of(behaviour_NV), importance_max=importance_max
    )
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == pytest.approx(value)
    torch.testing.assert_close(logits_NV.grad, gradient_NV)
    assert (terms.count, int(terms.metrics["clipped"])) == (count, clipped)


def test_it_is_unbiased_over_ten_thousand_sampled_answers() -> None:
    """The mean over another policy's answers lies within 4 standard errors of the reverse KL's own gradient."""
    vocab, count = 8, 10_000
    teacher_1V, behaviour_1V = random_teacher(1, vocab, 5, 1.0), random_teacher(1, vocab, 6, 1.0)
    start_V = torch.randn(vocab, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    exact_V = start_V.clone().requires_grad_()
    log_q_V = exact_V.log_softmax(0)
    reverse = (log_q_V.exp() * (log_q_V - teacher_1V[0])).sum()
    reverse.backward()

    ids_N = drawn(behaviour_1V.expand(count, vocab), 8)
    logits_NV = start_V.expand(count, vocab).clone().requires_grad_()
    student_N = logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    terms = policy_gradient(student_N, teacher_1V[0, ids_N], behaviour_1V[0, ids_N], importance_max=math.inf)
    terms.loss_sum.backward()
    assert logits_NV.grad is not None
    assert exact_V.grad is not None
    error_V = logits_NV.grad.std(0) / math.sqrt(count)
    assert bool(((logits_NV.grad.mean(0) - exact_V.grad).abs() < 4 * error_V).all())
    assert bool((exact_V.grad.abs() > 20 * error_V).any())  # otherwise the test would show nothing
    scores_N = (start_V.log_softmax(0)[ids_N] - teacher_1V[0, ids_N]) * (
        start_V.log_softmax(0)[ids_N] - behaviour_1V[0, ids_N]
    ).exp()
    assert terms.loss_sum.item() / count == pytest.approx(float(scores_N.mean()))
    assert abs(float(scores_N.mean() - reverse.detach())) < 4 * float(scores_N.std()) / math.sqrt(count)


def test_without_another_writer_the_weights_are_one() -> None:
    student_N = torch.tensor([-0.5, -1.0, -3.0], requires_grad=True)
    terms = policy_gradient(student_N, torch.tensor([-0.5, -2.0, -1.0]), student_N.detach())
    terms.loss_sum.backward()
    torch.testing.assert_close(student_N.grad, torch.tensor([0.0, 1.0, -2.0]))
    assert (float(terms.metrics["importance"]), int(terms.metrics["clipped"])) == (3.0, 0)


def test_nothing_to_learn_from_is_zero_with_a_gradient_of_zeros() -> None:
    hidden_ND, weight_VD = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    none_N = torch.zeros(0, dtype=torch.int64)
    student_N = sequence_log_probs_from_hidden(hidden_ND, weight_VD, none_N, none_N, 0)
    terms = policy_gradient(student_N, torch.zeros(0), torch.zeros(0))
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


def test_a_bound_that_leaves_no_weight_is_refused() -> None:
    with pytest.raises(TargetError, match="importance_max is 0: must be above 0"):
        policy_gradient(torch.zeros(1), torch.zeros(1), torch.zeros(1), importance_max=0)
