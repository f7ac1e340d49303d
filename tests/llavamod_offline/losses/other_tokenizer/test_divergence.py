"""The loss over aligned targets alone; `tests/teacher_cache/other_tokenizer/test_dense.py` has its reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llavamod_offline.losses.fused import LossTerms, cross_entropy_from_hidden
from llavamod_offline.losses.kinds import DIVERGENCE_KINDS, DivergenceKind
from llavamod_offline.losses.other_tokenizer.divergence import aligned_distillation_from_hidden
from llavamod_offline.losses.other_tokenizer.targets import AlignedTargets
from llavamod_offline.models.lm_head import LmHead

VOCAB, HIDDEN, POSITIONS = 20, 8, 6


def _targets() -> AlignedTargets:
    """Four spans over six tokens: two of one token, one of two tokens, and one of two where the teacher has one."""
    rows = [[0.6, 0.2, 0.0], [0.5, 0.0, 0.0], [0.3, 0.3, 0.1], [0.7, 0.1, 0.1]]
    return AlignedTargets(
        rows_S=torch.tensor([0, 2, 3, 5]),
        rows_P=torch.tensor([1, 4]),
        spans_P=torch.tensor([1, 3]),
        topk_ids_SK=torch.tensor([[3, 5, -1], [7, -1, -1], [1, 2, 4], [0, 9, 8]]),
        topk_log_probs_SK=torch.tensor(rows).log(),
        unmatched_log_probs_SU=torch.tensor([[0.1, 0.05], [0.2, 0.0], [0.0, 0.0], [0.05, 0.0]]).log(),
        tail_log_mass_S=torch.tensor([0.05, 0.1, 0.3, 0.05]).log(),
        path_log_probs_S=torch.tensor([0.0, math.log(0.8), 0.0, 0.0]),
        is_single_S=torch.tensor([True, False, True, False]),
    )


def _terms(
    hidden_ND: Tensor, head: LmHead, *, chunk_size: int | None = None, divergence: DivergenceKind = "forward_kl"
) -> LossTerms:
    return aligned_distillation_from_hidden(
        hidden_ND,
        head,
        torch.arange(POSITIONS),
        _targets(),
        has_counterpart_V=torch.arange(VOCAB) < 12,
        divergence=divergence,
        lm_weight=0.5,
        chunk_size=chunk_size,
    )


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(POSITIONS, HIDDEN, generator=generator), torch.randn(VOCAB + 4, HIDDEN, generator=generator)


@pytest.mark.parametrize("divergence", DIVERGENCE_KINDS)
def test_chunks_change_nothing_and_gradients_are_those_of_differences(divergence: DivergenceKind) -> None:
    found = []
    for chunk_size in (None, 1, 3):
        hidden_ND, weight_VD = (tensor.requires_grad_() for tensor in _inputs())
        terms = _terms(hidden_ND, LmHead(weight_VD, softcap=4.0), chunk_size=chunk_size, divergence=divergence)
        found.append((terms.loss_sum, *torch.autograd.grad(terms.loss_sum, (hidden_ND, weight_VD))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    hidden_ND, weight_VD = _inputs()
    step_ND, step_VD = 1e-3 * torch.randn(POSITIONS, HIDDEN), 1e-3 * torch.randn(VOCAB + 4, HIDDEN)
    step_VD[VOCAB:] = 0
    sides = [
        _terms(hidden_ND + sign * step_ND, LmHead(weight_VD + sign * step_VD, softcap=4.0), divergence=divergence)
        for sign in (1, -1)
    ]
    slope = (found[0][1] * step_ND).sum() + (found[0][2] * step_VD).sum()
    torch.testing.assert_close((sides[0].loss_sum - sides[1].loss_sum) / 2, slope, rtol=0.02, atol=2e-5)


def test_ids_beyond_the_students_get_no_gradient() -> None:
    hidden_ND, weight_VD = (tensor.requires_grad_() for tensor in _inputs())
    _terms(hidden_ND, LmHead(weight_VD)).loss_sum.backward()
    assert weight_VD.grad is not None
    assert not weight_VD.grad[VOCAB:].any()
    assert weight_VD.grad[:VOCAB].any()


def test_without_spans_the_cross_entropy_is_left() -> None:
    hidden_ND, weight_VD = (tensor.requires_grad_() for tensor in _inputs())
    none = _targets()[:0]
    counterparts = torch.ones(VOCAB, dtype=torch.bool)
    terms = aligned_distillation_from_hidden(
        hidden_ND, weight_VD, torch.arange(POSITIONS), none, has_counterpart_V=counterparts, lm_weight=1.0
    )
    expected = cross_entropy_from_hidden(hidden_ND, weight_VD, torch.arange(POSITIONS), vocab_size=VOCAB)
    torch.testing.assert_close(terms.loss_sum, expected.loss_sum)
    terms.loss_sum.backward()
    assert terms.divergence_sum == 0


def test_a_student_that_has_the_teachers_probabilities_has_no_divergence() -> None:
    probs_V = torch.full((VOCAB,), 0.1 / (VOCAB - 3))
    probs_V[:3] = torch.tensor([0.6, 0.2, 0.1])
    targets = AlignedTargets(
        rows_S=torch.tensor([0]),
        rows_P=torch.zeros(0, dtype=torch.long),
        spans_P=torch.zeros(0, dtype=torch.long),
        topk_ids_SK=torch.tensor([[0, 1]]),
        topk_log_probs_SK=torch.tensor([[0.6, 0.2]]).log(),
        unmatched_log_probs_SU=torch.tensor([[0.1]]).log(),
        tail_log_mass_S=torch.tensor([0.1]).log(),
        path_log_probs_S=torch.zeros(1),
        is_single_S=torch.tensor([True]),
    )
    terms = aligned_distillation_from_hidden(
        probs_V.log()[None],
        torch.eye(VOCAB),
        torch.tensor([0]),
        targets,
        has_counterpart_V=torch.arange(VOCAB) < 2,
    )
    torch.testing.assert_close(terms.loss_sum, torch.tensor(0.0), atol=1e-6, rtol=0)
