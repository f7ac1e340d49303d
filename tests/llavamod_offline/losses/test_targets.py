"""Targets limited to the ids that a student has, when the teacher has more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets

T = 2.0


def targets(log_probs_NV: Tensor, top_k: int, samples_NM: Tensor) -> SparseTargets:
    """Records with the `top_k` most likely ids and the given tail samples, equally weighted."""
    topk, ids = log_probs_NV.sort(descending=True, stable=True)
    rest_N = topk[:, top_k:].logsumexp(-1) if top_k < topk.shape[1] else torch.full((len(topk),), -torch.inf)
    weights_NM = torch.full(samples_NM.shape, 1 / max(samples_NM.shape[1], 1))
    return SparseTargets(
        topk_ids_NK=ids[:, :top_k],
        topk_log_probs_NK=topk[:, :top_k],
        tail_log_mass_N=rest_N,
        tail_ids_NM=samples_NM,
        tail_weights_NM=weights_NM,
        target_ids_N=torch.zeros(len(topk), dtype=torch.long),
        target_log_probs_N=log_probs_NV[:, 0],
        entropy_N=-(log_probs_NV.exp() * log_probs_NV).sum(-1),
        log_normalisers_NS=(log_probs_NV / T).logsumexp(-1)[:, None],
        temperatures=(T,),
        vocab_size=log_probs_NV.shape[1],
    )


def test_whole_distributions_become_those_of_the_ids_that_are_left() -> None:
    logits_NV = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 3
    none = torch.zeros(50, 0, dtype=torch.long)
    cut = targets(logits_NV.log_softmax(-1), 12, none).limited(9)
    expected = targets(logits_NV[:, :9].log_softmax(-1), 9, none)
    assert cut.vocab_size == 9
    assert torch.equal(cut.topk_ids_NK[:, :9], expected.topk_ids_NK)
    assert bool((cut.topk_ids_NK[:, 9:] == EMPTY_ID).all())
    assert bool((cut.topk_log_probs_NK[:, 9:] == -torch.inf).all())
    for name in ("topk_log_probs_NK", "target_log_probs_N", "entropy_N", "log_normalisers_NS"):
        mine = getattr(cut, name)
        mine = mine[:, :9] if name.startswith("topk") else mine
        torch.testing.assert_close(mine, getattr(expected, name), atol=1e-4, rtol=1e-4)


def test_ids_of_the_tail_leave_with_the_share_that_they_represent() -> None:
    probs_NV = torch.tensor([[0.5, 0.2, 0.05, 0.1, 0.15]])
    cut = targets(probs_NV.log(), 1, torch.tensor([[1, 3, 4, 2]])).limited(4)  # a quarter of the tail is id 4
    assert cut.tail_ids_NM.tolist() == [[1, 3, EMPTY_ID, 2]]
    torch.testing.assert_close(cut.tail_weights_NM, torch.tensor([[1, 1, 0, 1]]) / 3)
    torch.testing.assert_close(cut.tail_log_mass_N.exp(), torch.tensor([0.375 / 0.875]))
    torch.testing.assert_close(cut.topk_log_probs_NK.exp(), torch.tensor([[0.5 / 0.875]]))


@pytest.mark.parametrize("size", [5, 7])
def test_a_student_with_all_ids_gets_the_records_as_they_are(size: int) -> None:
    made = targets(torch.tensor([[0.5, 0.2, 0.05, 0.1, 0.15]]).log(), 2, torch.tensor([[2]]))
    assert made.limited(size) is made


def test_a_distribution_that_is_left_with_nothing_stays_finite() -> None:
    made = targets(torch.tensor([[1e-30, 1e-30, 1 - 2e-30]]).log(), 1, torch.tensor([[2]])).limited(2)
    assert not any(bool(value.isnan().any()) for value in vars(made).values() if isinstance(value, Tensor))
