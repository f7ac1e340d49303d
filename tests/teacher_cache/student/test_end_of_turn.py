"""Swapping two ids: a permutation, so a distribution stays one, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llavamod_offline.losses.divergence import forward_kl
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from teacher_cache.read.reader import open_cache
from teacher_cache.student.end_of_turn import TokenIdSwap

IDS = st.integers(0, 30)


@given(ids=st.lists(IDS), a=IDS, b=IDS)
def test_ids_change_places(ids: list[int], a: int, b: int) -> None:
    swap = TokenIdSwap(a, b)
    there = swap.ids(np.array(ids, np.int64))
    assert there.tolist() == [b if number == a else a if number == b else number for number in ids]
    assert swap.ids(there).tolist() == ids


def _dense(targets: SparseTargets, vocab: int) -> Tensor:
    """Top-k and tail samples as a table over the vocabulary, [N, vocab]: the teacher's probability for each id."""
    table = torch.zeros(len(targets), vocab, dtype=torch.float64)
    for ids_NK, mass_NK in (
        (targets.topk_ids_NK, targets.topk_log_probs_NK.double().exp()),
        (targets.tail_ids_NM, targets.tail_weights_NM.double() * targets.tail_log_mass_N.double().exp()[:, None]),
    ):
        for row in range(len(targets)):
            for number, mass in zip(ids_NK[row].tolist(), mass_NK[row].tolist(), strict=True):
                if number != EMPTY_ID:
                    table[row, number] += mass
    return table


@pytest.mark.parametrize(("a", "b"), [(396, 398), (12, 340), (5, 5), (396, 400)])
def test_the_teachers_distribution_has_two_columns_exchanged(finished: Path, a: int, b: int) -> None:
    """Also if a top-k, or a position's tail samples, contain both ids."""
    cache = open_cache(finished)
    targets = cache.targets([(key, "response") for key in sorted(cache.keys("response"))[:6]])
    before, after = _dense(targets, 401), _dense(TokenIdSwap(a, b).targets(targets), 401)
    order = torch.arange(401)
    order[[a, b]] = order[[b, a]]
    assert torch.equal(after, before[:, order])
    read = TokenIdSwap(a, b).targets(targets)
    assert read.vocab_size == max(400, a + 1, b + 1)
    for name in ("topk_log_probs_NK", "tail_log_mass_N", "target_log_probs_N", "entropy_N", "log_normalisers_NS"):
        assert torch.equal(getattr(read, name), getattr(targets, name))


def test_a_student_with_exchanged_columns_has_the_same_loss(finished: Path) -> None:
    cache = open_cache(finished)
    targets = cache.targets([(key, "response") for key in sorted(cache.keys("response"))[:6]])
    likely = int(targets.topk_ids_NK[0, 0])
    swap = TokenIdSwap(likely, 398)
    logits_NV = torch.randn(len(targets), 400, generator=torch.Generator().manual_seed(0))
    logits_NV[:, likely] += 6.0
    other_NV = logits_NV.clone()
    other_NV[:, [likely, 398]] = logits_NV[:, [398, likely]]
    before = float(forward_kl(logits_NV, targets).loss_sum)
    assert float(forward_kl(other_NV, swap.targets(targets)).loss_sum) == pytest.approx(before, rel=1e-6)
    assert float(forward_kl(logits_NV, swap.targets(targets)).loss_sum) > before + 1.0


@pytest.mark.parametrize(("a", "b"), [(1, 4), (2, 2), (1, 6)])
def test_a_profile_is_exchanged_over_as_many_ids_as_the_targets(a: int, b: int) -> None:
    profile_V = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.25, 0.05])
    swap = TokenIdSwap(a, b)
    dense = dict(enumerate(profile_V.tolist()))
    expected = {**dense, a: dense.get(b, 0.0), b: dense.get(a, 0.0)}
    assert swap.profile(profile_V).tolist() == [expected[number] for number in range(swap.vocab_size(6))]
    assert swap.vocab_size(6) == max(6, b + 1)
