"""Mixtures of teachers: equal to the dense mixture if records hold everything, unbiased if they sample tails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.divergence import forward_kl, reverse_kl
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.mixture import concatenate_targets, mix_targets
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from teacher_cache.engines.tail_samples import tail_samples
from tests.llavamod_offline.losses.reference import full_kl, random_teacher, truncate

N, V = 12, 17
WEIGHTS = (3.0, 1.0, 4.0)


def dense_teachers(count: int = 3) -> list[Tensor]:
    return [random_teacher(N, V, seed, sharpness=1.5 + seed) for seed in range(count)]


def dense_mixture(teachers: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    shares = [weight / sum(weights) for weight in weights]
    return sum((share * t.exp() for share, t in zip(shares, teachers, strict=True)), torch.zeros(N, V).double())


def with_one_answer(parts: list[SparseTargets], teachers: list[Tensor]) -> list[SparseTargets]:
    """The same targets with the same actual tokens for all teachers."""
    ids_N = parts[0].target_ids_N
    return [
        replace(part, target_ids_N=ids_N, target_log_probs_N=t.gather(1, ids_N[:, None]).squeeze(1).float())
        for part, t in zip(parts, teachers, strict=True)
    ]


def densified(targets: SparseTargets) -> Tensor:
    """The probabilities [N, V] that top-k and tail samples stand for."""
    dense_NV = torch.zeros(len(targets), targets.vocab_size, dtype=torch.float64)
    tails_NM = targets.tail_weights_NM * targets.tail_log_mass_N.exp()[:, None]
    for ids, probs in ((targets.topk_ids_NK, targets.topk_log_probs_NK.exp()), (targets.tail_ids_NM, tails_NM)):
        kept = torch.where(ids == EMPTY_ID, 0.0, probs).double()
        dense_NV = dense_NV.scatter_add(1, ids.long().clamp(min=0), kept)
    return dense_NV


def test_exhaustive_records_give_the_dense_mixture() -> None:
    teachers = dense_teachers()
    parts = with_one_answer([truncate(t, top_k=V) for t in teachers], teachers)
    parts = [part[0:N:3] for part in parts]  # the positions at which `truncate` keeps the full top-k
    teachers = [t[0:N:3] for t in teachers]
    p_NV = sum(w / sum(WEIGHTS) * t.exp() for w, t in zip(WEIGHTS, teachers, strict=True))
    assert isinstance(p_NV, Tensor)
    for by_samples in (True, False):
        mixed = mix_targets(parts, WEIGHTS, by_samples=by_samples)
        torch.testing.assert_close(densified(mixed), p_NV, atol=1e-6, rtol=1e-5)
        assert bool((mixed.topk_log_probs_NK.diff(dim=-1) <= 0).all())
        assert bool(torch.isneginf(mixed.tail_log_mass_N).all())
        expected_N = p_NV.gather(1, mixed.target_ids_N[:, None]).squeeze(1).log().float()
        torch.testing.assert_close(mixed.target_log_probs_N, expected_N, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed.entropy_N, torch.special.entr(p_NV).sum(-1).float(), atol=1e-5, rtol=1e-5)
        logits_NV = torch.randn(len(p_NV), V, generator=torch.Generator().manual_seed(9))
        tail: TailEstimator = "samples" if by_samples else "bucket"
        torch.testing.assert_close(
            forward_kl(logits_NV, mixed, tail=tail).loss_sum.double(),
            full_kl(p_NV.log(), logits_NV.double()),
            atol=1e-4,
            rtol=1e-4,
        )


def test_the_top_k_part_is_the_union_and_everything_sums_to_one() -> None:
    teachers = dense_teachers()
    parts = with_one_answer(
        [truncate(t, top_k=k, samples=3) for t, k in zip(teachers, (1, 3, 5), strict=True)], teachers
    )
    for by_samples in (True, False):
        mixed = mix_targets(parts, WEIGHTS, by_samples=by_samples)
        for row in range(N):
            union = set().union(*({int(v) for v in part.topk_ids_NK[row] if v != EMPTY_ID} for part in parts))
            assert {int(v) for v in mixed.topk_ids_NK[row] if v != EMPTY_ID} == union
            assert not union & {int(v) for v in mixed.tail_ids_NM[row] if v != EMPTY_ID}
        total_N = mixed.topk_log_probs_NK.exp().sum(-1) + mixed.tail_log_mass_N.exp()
        torch.testing.assert_close(total_N, torch.ones(N), atol=1e-5, rtol=0)
        weights_N = mixed.tail_weights_NM.sum(-1)
        assert bool(((weights_N - 1).abs().lt(1e-6) | weights_N.eq(0)).all())


def sampled(part: SparseTargets, log_probs_NV: Tensor, u: float, count: int) -> SparseTargets:
    """The same records with `count` systematic samples from each tail."""
    kept_NK = (part.topk_ids_NK != EMPTY_ID).double()
    inside_NV = torch.zeros(N, V).double().scatter_add(1, part.topk_ids_NK.clamp(min=0), kept_NK)
    outside_NV = torch.where(inside_NV > 0, 0.0, log_probs_NV.exp())
    ids_NM = tail_samples(outside_NV, torch.full((N,), u).double(), torch.full((N,), count), count)
    return replace(part, tail_ids_NM=ids_NM, tail_weights_NM=torch.full(ids_NM.shape, 1 / count))


def test_sampled_tails_give_an_unbiased_mixture_and_gradient() -> None:
    """Averaged over a grid of uniform numbers, also for ids in one teacher's top-k and another's tail."""
    teachers = dense_teachers()
    p_NV = dense_mixture(teachers, WEIGHTS)
    logits_NV = torch.randn(N, V, generator=torch.Generator().manual_seed(5)).requires_grad_()
    parts = [truncate(t, top_k=2 + n) for n, t in enumerate(teachers)]
    parts = with_one_answer(parts, teachers)
    mean_NV, gradient_NV, drawings = torch.zeros(N, V).double(), torch.zeros(N, V).double(), 200
    for number in range(drawings):
        u = (number + 0.5) / drawings
        made = [sampled(part, t, u, 1 + n) for n, (part, t) in enumerate(zip(parts, teachers, strict=True))]
        mixed = mix_targets(made, WEIGHTS, by_samples=True)
        mean_NV += densified(mixed) / drawings
        (own_NV,) = torch.autograd.grad(forward_kl(logits_NV, mixed, tail="samples").loss_sum, logits_NV)
        gradient_NV += own_NV.double() / drawings
    assert float((mean_NV - p_NV).abs().max()) < 0.005
    exact_NV = logits_NV.detach().double().softmax(-1) - p_NV
    assert float((gradient_NV - exact_NV).abs().max()) < 0.005
    assert float((densified(mixed) - p_NV).abs().max()) > 0.05  # a single draw is far from it


def test_whole_tails_miss_at_most_their_mass() -> None:
    teachers = dense_teachers()
    p_NV = dense_mixture(teachers, WEIGHTS)
    parts = with_one_answer([truncate(t, top_k=2 + n) for n, t in enumerate(teachers)], teachers)
    mixed = mix_targets(parts, WEIGHTS, by_samples=False)
    masses_N = sum(
        w / sum(WEIGHTS) * part.tail_log_mass_N.double().exp() for w, part in zip(WEIGHTS, parts, strict=True)
    )
    assert isinstance(masses_N, Tensor)
    torch.testing.assert_close(mixed.tail_log_mass_N.exp().double(), masses_N, atol=1e-6, rtol=1e-5)
    for row in range(N):
        ids = [int(v) for v in mixed.topk_ids_NK[row] if v != EMPTY_ID]
        missing = p_NV[row, ids] - densified(mixed)[row, ids]
        assert float(missing.min()) > -1e-6
        assert float(missing.sum()) <= float(masses_N[row]) + 1e-6
    reverse_kl(torch.randn(N, V), mixed)  # finite: no tail has vanished


def test_one_unsampled_tail_leaves_the_position_to_the_bucket() -> None:
    teachers = dense_teachers(2)
    parts = with_one_answer([truncate(teachers[0], top_k=2, samples=3), truncate(teachers[1], top_k=2)], teachers)
    mixed = mix_targets(parts, (1, 1), by_samples=True)
    assert not mixed.tail_weights_NM.any()
    total_N = mixed.topk_log_probs_NK.exp().sum(-1) + mixed.tail_log_mass_N.exp()
    torch.testing.assert_close(total_N, torch.ones(N), atol=1e-5, rtol=0)


def test_the_same_teacher_twice_is_that_teacher() -> None:
    (teacher,) = dense_teachers(1)
    part = truncate(teacher, top_k=4, samples=3)
    mixed = mix_targets([part, part], (1, 2), by_samples=True)
    torch.testing.assert_close(densified(mixed), densified(part), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.entropy_N, part.entropy_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.target_log_probs_N, part.target_log_probs_N, atol=1e-5, rtol=1e-5)


def test_records_of_different_tokens_are_refused() -> None:
    teachers = dense_teachers(2)
    parts = [truncate(t, top_k=2, seed=n) for n, t in enumerate(teachers)]
    with pytest.raises(TargetError, match="records of different tokens"):
        mix_targets(parts, (1, 1), by_samples=True)
    small = replace(parts[0], target_ids_N=parts[1].target_ids_N, vocab_size=V + 1)
    with pytest.raises(TargetError, match="the same ids and temperature 1"):
        mix_targets([small, parts[1]], (1, 1), by_samples=True)


def test_targets_of_unlike_widths_are_put_together() -> None:
    teachers = dense_teachers(2)
    parts = [truncate(teachers[0], top_k=2, samples=4), truncate(teachers[1], top_k=6, samples=1)]
    both = concatenate_targets(parts)
    torch.testing.assert_close(densified(both), torch.cat([densified(part) for part in parts]))
    assert both.topk_ids_NK.shape == (2 * N, 6)
    assert torch.equal(both.entropy_N, torch.cat([part.entropy_N for part in parts]))
