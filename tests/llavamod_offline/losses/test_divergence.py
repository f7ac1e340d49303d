from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.divergence import forward_kl
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.tail_estimators import TailPrior, choose_tail, prior_share
from llavamod_offline.losses.targets import SparseTargets
from tests.llavamod_offline.losses.reference import full_kl, random_teacher, reference_kl, truncate

ESTIMATORS: tuple[TailEstimator, ...] = ("bucket", "samples", "renormalised")


def _student(n: int, rows: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, rows, generator=generator, dtype=torch.float64)


def _check(
    log_probs_NV: Tensor, targets: SparseTargets, rows: int, tail: TailEstimator, temperature: float = 1.0
) -> None:
    expected_logits = _student(len(targets), rows).requires_grad_()
    expected = reference_kl(log_probs_NV, targets, expected_logits, tail, temperature)
    (expected_gradient,) = torch.autograd.grad(3.0 * expected, expected_logits)
    logits = expected_logits.detach().float().requires_grad_()
    result = forward_kl(logits, targets, tail=tail, temperature=temperature)
    (gradient,) = torch.autograd.grad(3.0 * result.loss_sum, logits)
    torch.testing.assert_close(result.loss_sum.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-4, atol=2e-6)
    assert result.count == len(targets)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 7),
    vocab=st.integers(2, 23),
    extra=st.integers(0, 3),
    top_k=st.integers(0, 25),
    samples=st.integers(1, 6),
    tail=st.sampled_from(ESTIMATORS),
    seed=st.integers(0, 2**20),
)
def test_value_and_gradient_equal_the_dense_reference(
    n: int, vocab: int, extra: int, top_k: int, samples: int, tail: TailEstimator, seed: int
) -> None:
    log_probs_NV = random_teacher(n, vocab, seed)
    _check(log_probs_NV, truncate(log_probs_NV, top_k=top_k, samples=samples, seed=seed), vocab + extra, tail)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalised"])
@pytest.mark.parametrize("top_k", [0, 3, 17])
def test_temperature_equals_the_dense_reference(temperature: float, tail: TailEstimator, top_k: int) -> None:
    log_probs_NV = random_teacher(6, 17, 3)
    targets = truncate(log_probs_NV, top_k=top_k, samples=2, temperatures=(2.0, 0.5, 4.0))
    _check(log_probs_NV, targets, 19, tail, temperature)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_samples_of_another_temperature_equal_the_dense_reference(temperature: float) -> None:
    log_probs_NV = random_teacher(10, 17, 3)
    targets = truncate(log_probs_NV, top_k=3, samples=4, temperatures=(temperature,), sampled_at=temperature)
    _check(log_probs_NV, targets, 19, "samples", temperature)


@given(n=st.integers(0, 7), top_k=st.integers(0, 12), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**20))
def test_a_prior_pulls_by_the_mean_tail_in_place_of_a_share_of_the_samples(
    n: int, top_k: int, share: float, seed: int
) -> None:
    """The value stays that of the samples; the gradient is that of the mixture."""
    log_probs_NV = random_teacher(n, 13, seed)
    targets = truncate(log_probs_NV, top_k=top_k, samples=3, seed=seed)
    profile_V = torch.rand(13, generator=torch.Generator().manual_seed(seed)).square()
    profile_V[seed % 13] = 0.0
    prior = TailPrior(share, profile_V / profile_V.sum())
    logits = _student(n, 13, seed).float().requires_grad_()
    result = forward_kl(logits, targets, tail="samples", prior=prior)
    plain = forward_kl(logits, targets, tail="samples")
    torch.testing.assert_close(result.loss_sum, plain.loss_sum)
    result.loss_sum.backward()
    dense = logits.detach().double().requires_grad_()
    reference_kl(log_probs_NV, targets, dense, "samples", prior=prior).backward()
    assert logits.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(logits.grad.double(), dense.grad, rtol=1e-4, atol=1e-5)


def test_the_default_estimator() -> None:
    assert choose_tail("forward_kl", 2.0, sampled_at=2.0, has_samples=True) == "samples"
    assert choose_tail("js", 1.0, sampled_at=2.0, has_samples=True) == "bucket"
    assert choose_tail("forward_kl", 1.0, sampled_at=2.0, has_samples=False) == "bucket"
    with pytest.raises(TargetError, match=r"captured for 2.*capture\.temperature=1, or set loss.tail to bucket"):
        choose_tail("forward_kl", 1.0, sampled_at=2.0, has_samples=True)


def test_records_that_return_often_have_a_prior() -> None:
    assert prior_share(positions=128, epochs=1) == 0
    assert prior_share(positions=1_000_000, epochs=10) == 0
    few, more, most = (prior_share(positions=128, epochs=epochs) for epochs in (20, 400, 10**6))
    assert 0 < few < more < most < 1
    assert prior_share(positions=10_000, epochs=20) < few


@pytest.mark.parametrize("tail", ESTIMATORS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_head_gives_the_full_divergence(tail: TailEstimator, temperature: float) -> None:
    log_probs_NV = random_teacher(5, 31, 1)
    even = dataclasses.replace(
        truncate(log_probs_NV, top_k=31, temperatures=(2.0,)),
        topk_ids_NK=log_probs_NV.argsort(descending=True),
        topk_log_probs_NK=log_probs_NV.sort(descending=True).values.float(),
        # What rounding might leave of a tail, where the top-k already holds every id.
        tail_log_mass_N=torch.full((5,), -17.0),
    )
    logits = _student(5, 31).float().requires_grad_()
    result = forward_kl(logits, even, tail=tail, temperature=temperature)
    dense_logits = logits.detach().double().requires_grad_()
    dense = full_kl(log_probs_NV, dense_logits, temperature)
    torch.testing.assert_close(result.loss_sum.double(), dense, rtol=1e-5, atol=1e-5)
    dense.backward()
    result.loss_sum.backward()
    assert logits.grad is not None
    assert dense_logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), dense_logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 8, 40])
def test_bucket_is_zero_for_the_teacher_itself_and_never_negative(top_k: int, temperature: float) -> None:
    log_probs_NV = random_teacher(50, 40, 5)
    targets = truncate(log_probs_NV, top_k=top_k, temperatures=(2.0,))
    same = log_probs_NV.float().requires_grad_()
    result = forward_kl(same, targets, temperature=temperature)
    result.loss_sum.backward()
    assert abs(result.loss_sum.item()) < 1e-4
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-5
    for seed in range(20):
        other = forward_kl(_student(50, 40, seed).float() * 0.1 + same.detach(), targets, temperature=temperature)
        assert other.loss_sum.item() >= -1e-5


def test_bucket_bounds_the_full_divergence_from_below_and_samples_estimate_it_without_bias() -> None:
    log_probs_NV = random_teacher(4, 60, 2)
    logits = _student(4, 60)
    full = float(full_kl(log_probs_NV, logits))
    bucket = forward_kl(logits.float(), truncate(log_probs_NV, top_k=6)).loss_sum.item()
    assert bucket < full - 0.05
    estimates = [
        forward_kl(logits.float(), truncate(log_probs_NV, top_k=6, samples=8, seed=s), tail="samples").loss_sum.item()
        for s in range(400)
    ]
    error = torch.tensor(estimates).std() / 20
    assert abs(sum(estimates) / 400 - full) < 4 * float(error)


def test_rows_beyond_the_vocabulary_get_no_probability_and_no_gradient() -> None:
    log_probs_NV = random_teacher(6, 20, 4)
    targets = truncate(log_probs_NV, top_k=5, samples=2)
    logits = _student(6, 52).float()
    logits[:, 20:] = 100.0
    logits.requires_grad_()
    with_extra = forward_kl(logits, targets)
    without = forward_kl(logits.detach()[:, :20], targets)
    assert with_extra.loss_sum.item() == pytest.approx(without.loss_sum.item(), rel=1e-6)
    with_extra.loss_sum.backward()
    assert logits.grad is not None
    assert not logits.grad[:, 20:].any()


def test_extreme_logits_stay_finite() -> None:
    log_probs_NV = random_teacher(3, 12, 0)
    targets = truncate(log_probs_NV, top_k=4, samples=2)
    logits = torch.zeros(3, 12)
    logits[0, int(targets.topk_ids_NK[0, 0])] = 300.0  # the student puts nothing outside the top-k
    logits[1, 5] = -300.0
    logits[2] = 1e4
    logits.requires_grad_()
    for tail in ESTIMATORS:
        result = forward_kl(logits, targets, tail=tail)
        (gradient,) = torch.autograd.grad(result.loss_sum, logits)
        assert torch.isfinite(result.loss_sum)
        assert torch.isfinite(gradient).all()


def test_metrics_are_sums_over_positions() -> None:
    log_probs_NV = random_teacher(9, 25, 8)
    targets = truncate(log_probs_NV, top_k=25 - 1, samples=3)
    logits = _student(9, 25)
    logits[:4] = log_probs_NV[:4]
    metrics = forward_kl(logits.float(), targets).metrics
    agreement = (logits.argmax(-1) == log_probs_NV.argmax(-1)) & (targets.topk_ids_NK[:, 0] >= 0)
    assert float(metrics["top1_agreement"]) == float(agreement.sum())
    student = logits.softmax(-1)
    outside = sum(
        1 - float(student[i, [int(v) for v in targets.topk_ids_NK[i] if v >= 0]].sum()) for i in range(len(targets))
    )
    assert float(metrics["student_tail"]) == pytest.approx(outside, abs=1e-4)
    assert float(metrics["teacher_tail"]) == pytest.approx(float(targets.tail_log_mass_N.exp().sum()), rel=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(float(targets.entropy_N.sum()), rel=1e-6)
    drawn = reference_kl(log_probs_NV, targets, logits, "samples")
    assert float(metrics["kl"]) == pytest.approx(float(drawn), rel=1e-4)
    p_NV, gap_NV = log_probs_NV.exp(), log_probs_NV - logits.log_softmax(-1)
    topk = sum(
        float((p_NV[i] * gap_NV[i])[[int(v) for v in ids if v >= 0]].sum()) for i, ids in enumerate(targets.topk_ids_NK)
    )
    assert float(metrics["tail_kl"]) == pytest.approx(float(drawn) - topk, rel=1e-3, abs=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_no_positions_give_zero_with_zero_gradient() -> None:
    targets = truncate(random_teacher(0, 11, 0), top_k=3, samples=2)
    logits = torch.zeros(0, 11, requires_grad=True)
    result = forward_kl(logits, targets)
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0
    assert result.count == 0
    assert logits.grad is not None
    assert {name: float(value) for name, value in result.metrics.items()} == dict.fromkeys(result.metrics, 0.0)


def test_half_precision_logits_are_computed_in_float32() -> None:
    log_probs_NV = random_teacher(6, 40, 3)
    targets = truncate(log_probs_NV, top_k=9)
    half = _student(6, 40).bfloat16().requires_grad_()
    result = forward_kl(half, targets)
    expected = forward_kl(half.detach().float(), targets)
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == expected.loss_sum.item()
    result.loss_sum.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


class TestErrors:
    targets = truncate(random_teacher(4, 20, 4), top_k=5, samples=2, temperatures=(2.0,))
    logits = torch.zeros(4, 20)

    def test_temperature_without_normaliser(self) -> None:
        with pytest.raises(TargetError, match=r"temperature 3 .*capture.*capture.temperatures"):
            forward_kl(self.logits, self.targets, temperature=3.0)

    def test_samples_at_another_temperature(self) -> None:
        with pytest.raises(TargetError, match=r"captured for 1: capture it again with capture.temperature=2"):
            forward_kl(self.logits, self.targets, tail="samples", temperature=2.0)
        whole = truncate(random_teacher(1, 20, 4), top_k=20, samples=2, temperatures=(2.0,))
        forward_kl(self.logits[:1], whole, tail="samples", temperature=2.0)

    def test_a_cache_without_samples(self) -> None:
        with pytest.raises(TargetError, match="no tail samples"):
            forward_kl(self.logits, truncate(random_teacher(4, 20, 4), top_k=5), tail="samples")

    def test_ids_beyond_the_head(self) -> None:
        largest = max(int(self.targets.topk_ids_NK.max()), int(self.targets.tail_ids_NM.max()))
        with pytest.raises(TargetError, match="beyond the 8 rows of the student's LM head"):
            forward_kl(torch.zeros(4, 8), self.targets)
        assert largest >= 8

    def test_a_smaller_head_that_holds_all_ids_will_do(self) -> None:
        targets = dataclasses.replace(self.targets, vocab_size=25)
        assert forward_kl(self.logits, targets).loss_sum.item() == pytest.approx(
            forward_kl(self.logits, self.targets).loss_sum.item()
        )

    def test_unknown_estimator_and_bad_temperature(self) -> None:
        with pytest.raises(TargetError, match="'buckets' is unknown: choose one of samples, bucket"):
            forward_kl(self.logits, self.targets, tail="buckets")  # type: ignore[arg-type]
        with pytest.raises(TargetError, match="temperature 0"):
            forward_kl(self.logits, self.targets, temperature=0.0)
