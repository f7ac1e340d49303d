"""Every divergence on top-k and bucket against an event-by-event reference, alone and with the fused LM head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.divergence import (
    Divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.kinds import DIVERGENCE_KINDS, DivergenceKind
from llavamod_offline.losses.targets import SparseTargets
from tests.llavamod_offline.losses.reference import (
    full_kl,
    random_teacher,
    reference_divergence,
    truncate,
    without_targets,
)

WEIGHT, SKEW = 0.3, 0.2
KINDS = DIVERGENCE_KINDS
DENSE: dict[str, Callable[..., Divergence]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": lambda *args, **more: jensen_shannon(*args, weight=WEIGHT, **more),
    "skewed_forward_kl": lambda *args, **more: skewed_forward_kl(*args, skew=SKEW, **more),
    "skewed_reverse_kl": lambda *args, **more: skewed_reverse_kl(*args, skew=SKEW, **more),
    "total_variation": total_variation,
}


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(0, 7),
    vocab=st.integers(2, 23),
    extra=st.integers(0, 3),
    top_k=st.integers(0, 25),
    samples=st.integers(0, 3),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from((1.0, 2.0, 4.0)),
    masked=st.sets(st.integers(0, 6)),
    seed=st.integers(0, 2**20),
)
def test_value_and_gradient_equal_the_reference(
    n: int, vocab: int, extra: int, top_k: int, samples: int, kind: str, temperature: float, masked: set[int], seed: int
) -> None:
    """Odd shapes, empty batches, top-k without tail, tails without top-k, rows without either, no samples at all."""
    log_probs_NV = random_teacher(n, vocab, seed)
    targets = truncate(log_probs_NV, top_k=top_k, samples=samples, temperatures=(2.0, 4.0), seed=seed)
    targets = without_targets(targets, [row for row in masked if row < n])
    expected_logits = (2 * _normal(n, vocab + extra, seed=seed + 1)).requires_grad_()
    expected = reference_divergence(
        log_probs_NV, targets, expected_logits, kind, js_weight=WEIGHT, skew=SKEW, temperature=temperature
    )
    (expected_gradient,) = torch.autograd.grad(3.0 * expected, expected_logits)
    logits = expected_logits.detach().float().requires_grad_()
    result = DENSE[kind](logits, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad(3.0 * result.loss_sum, logits)
    torch.testing.assert_close(result.loss_sum.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-4, atol=1e-5)
    assert result.count == n
    assert not gradient[[row for row in masked if row < n]].any()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 9),
    vocab=st.integers(2, 19),
    extra=st.integers(0, 3),
    top_k=st.integers(0, 19),
    chunk=st.integers(1, 11),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from((1.0, 2.0)),
    weights=st.sampled_from(((1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0))),
    weighted=st.booleans(),
    masked=st.sets(st.integers(0, 8)),
    seed=st.integers(0, 2**20),
)
def test_fused_equals_the_reference_in_any_chunks(
    n: int,
    vocab: int,
    extra: int,
    top_k: int,
    chunk: int,
    kind: DivergenceKind,
    temperature: float,
    weights: tuple[float, float],
    weighted: bool,
    masked: set[int],
    seed: int,
) -> None:
    log_probs_NV = random_teacher(n, vocab, seed)
    targets = without_targets(
        truncate(log_probs_NV, top_k=top_k, samples=2, temperatures=(2.0,), seed=seed),
        [row for row in masked if row < n],
    )
    kd_weight, lm_weight = weights
    weights_N = _normal(n, seed=seed + 2).exp().float() if weighted else None
    hidden_ND = _normal(n, 6, seed=seed + 1).requires_grad_()
    weight_VD = _normal(vocab + extra, 6, seed=3).requires_grad_()
    logits_NV = hidden_ND @ weight_VD.T
    divergence = reference_divergence(
        log_probs_NV,
        targets,
        logits_NV,
        kind,
        js_weight=WEIGHT,
        skew=SKEW,
        temperature=temperature,
        weights_N=weights_N,
    )
    token_N = torch.nn.functional.cross_entropy(
        logits_NV[:, :vocab], targets.target_ids_N, reduction="none", ignore_index=-1
    )
    cross_entropy = (token_N if weights_N is None else token_N * weights_N).sum()
    expected = torch.autograd.grad(
        0.1 * (kd_weight * divergence + lm_weight * cross_entropy), (hidden_ND, weight_VD), materialize_grads=True
    )
    leaves = hidden_ND.detach().float().requires_grad_(), weight_VD.detach().float().requires_grad_()
    terms = distillation_from_hidden(
        *leaves,
        targets,
        divergence=kind,
        js_weight=WEIGHT,
        skew=SKEW,
        temperature=temperature,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        weights_N=weights_N,
        chunk_size=chunk,
    )
    gradients = torch.autograd.grad(0.1 * terms.loss_sum, leaves)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(terms.divergence_sum.double(), divergence if kd_weight else zero, rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(
        terms.cross_entropy_sum.double(), cross_entropy if lm_weight else zero, rtol=5e-5, atol=5e-5
    )
    total = kd_weight * terms.divergence_sum + lm_weight * terms.cross_entropy_sum
    torch.testing.assert_close(terms.loss_sum.detach(), total, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=5e-4, atol=5e-5)


def test_by_hand() -> None:
    """Teacher (½, ¼ | ¼), student (¼, ½ | ¼): the two top-k ids and the bucket, in round numbers."""
    teacher = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
    logits = torch.tensor([[0.25, 0.5, 0.2, 0.05]]).log()
    targets = truncate(teacher, top_k=2)
    ln2 = math.log(2.0)
    skewed = 0.5 * math.log(0.5 / 0.3) + 0.25 * math.log(
        0.25 / 0.45
    )  # 0.2 · 0.5 + 0.8 · 0.25 and 0.2 · 0.25 + 0.8 · 0.5
    expected = {
        "forward_kl": 0.25 * ln2,  # ½ ln 2 − ¼ ln 2 + 0
        "reverse_kl": 0.25 * ln2,  # −¼ ln 2 + ½ ln 2 + 0
        "js": 0.3 * (0.5 * math.log(0.5 / 0.325) + 0.25 * math.log(0.25 / 0.425))
        + 0.7 * (0.25 * math.log(0.25 / 0.325) + 0.5 * math.log(0.5 / 0.425)),
        "skewed_forward_kl": skewed,
        "skewed_reverse_kl": skewed,  # the same numbers with the two ids exchanged
        "total_variation": 0.25,
    }
    for kind, value in expected.items():
        assert DENSE[kind](logits, targets).loss_sum.item() == pytest.approx(value, rel=1e-5), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 8, 40])
def test_zero_for_the_teacher_itself_and_never_negative(kind: str, temperature: float, top_k: int) -> None:
    log_probs_NV = random_teacher(50, 40, 5)
    targets = truncate(log_probs_NV, top_k=top_k, temperatures=(2.0,))
    same = log_probs_NV.float().requires_grad_()
    result = DENSE[kind](same, targets, temperature=temperature)
    assert abs(result.loss_sum.item()) < 1e-4
    if kind != "total_variation":  # its slope jumps at 0
        (gradient,) = torch.autograd.grad(result.loss_sum, same)
        assert float(gradient.abs().max()) < 1e-5
    for seed in range(10):
        other = (0.2 * _normal(50, 40, seed=seed) + log_probs_NV).float()
        assert DENSE[kind](other, targets, temperature=temperature).loss_sum.item() >= -1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_bucket_bounds_from_below_what_the_whole_vocabulary_gives(kind: str) -> None:
    """It is equal where the student's tail has the teacher's shape."""
    log_probs_NV = random_teacher(5, 40, 2)
    some, whole = (truncate(log_probs_NV[:1], top_k=top_k) for top_k in (6, 40))
    other = 2 * _normal(1, 40, seed=1).float()
    assert DENSE[kind](other, some).loss_sum.item() < DENSE[kind](other, whole).loss_sum.item() - 1e-3
    shifted = log_probs_NV[:1].float()
    shifted[0, some.topk_ids_NK[0]] += torch.tensor([1.0, -1.0, 0.5, -2.0, 3.0, 0.0])
    torch.testing.assert_close(
        DENSE[kind](shifted, some).loss_sum, DENSE[kind](shifted, whole).loss_sum, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0])
def test_a_tail_that_rounding_swallows_keeps_a_mass(temperature: float) -> None:
    """One id of probability 1e-20: at T = ¼ it has 1e-80, which 1 minus the top-k's sum cannot represent."""
    tiny = 1e-20
    log_probs_1V = torch.tensor([[0.7, 0.3, tiny]], dtype=torch.float64).log()
    targets = truncate(log_probs_1V, top_k=2, temperatures=(0.25, 0.5, 2.0))
    logits = torch.tensor([[0.1, -0.3, -90.0]], requires_grad=True)
    for kind in KINDS:
        expected = reference_divergence(
            log_probs_1V,
            targets,
            logits.detach().double(),
            kind,
            js_weight=WEIGHT,
            skew=SKEW,
            temperature=temperature,
        )
        result = DENSE[kind](logits, targets, temperature=temperature)
        assert result.loss_sum.item() == pytest.approx(expected.item(), rel=1e-4), kind
        (gradient,) = torch.autograd.grad(result.loss_sum, logits)
        assert torch.isfinite(gradient).all()


def test_they_tend_to_one_another_as_they_should() -> None:
    log_probs_NV, logits = random_teacher(9, 30, 2), (2 * _normal(9, 30, seed=1)).float()
    targets = truncate(log_probs_NV, top_k=9)
    forward, reverse = (DENSE[kind](logits, targets).loss_sum.item() for kind in ("forward_kl", "reverse_kl"))
    assert abs(forward - reverse) > 0.1
    small = 1e-4
    assert skewed_forward_kl(logits, targets, skew=small).loss_sum.item() == pytest.approx(forward, rel=1e-2)
    assert skewed_reverse_kl(logits, targets, skew=small).loss_sum.item() == pytest.approx(reverse, rel=1e-2)
    assert jensen_shannon(logits, targets, weight=small).loss_sum.item() / small == pytest.approx(forward, rel=2e-2)
    assert jensen_shannon(logits, targets, weight=1 - small).loss_sum.item() / small == pytest.approx(reverse, rel=2e-2)
    assert jensen_shannon(logits, targets).loss_sum.item() < 9 * math.log(2)
    assert total_variation(logits, targets).loss_sum.item() < 9


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind: str) -> None:
    log_probs_NV = random_teacher(4, 12, 0)
    targets = truncate(log_probs_NV, top_k=4, samples=2)
    logits = torch.zeros(4, 12)
    logits[0, int(targets.topk_ids_NK[0, 0])] = 300.0  # the student puts nothing outside the top-k
    logits[1, 5] = -300.0
    logits[2] = 1e4
    logits[3, 0] = -math.inf
    logits.requires_grad_()
    result = DENSE[kind](logits, targets)
    (gradient,) = torch.autograd.grad(result.loss_sum, logits)
    assert torch.isfinite(gradient).all()
    if kind not in ("forward_kl", "skewed_forward_kl"):
        assert torch.isfinite(result.loss_sum)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_computed_in_float32(kind: str) -> None:
    targets = truncate(random_teacher(6, 40, 3), top_k=9)
    half = (2 * _normal(6, 40, seed=7)).bfloat16().requires_grad_()
    result = DENSE[kind](half, targets)
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == DENSE[kind](half.detach().float(), targets).loss_sum.item()
    (gradient,) = torch.autograd.grad(result.loss_sum, half)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_is_the_same_whatever_the_divergence(kind: str) -> None:
    """It holds the forward KL from samples and stored entropy, the tails' masses, and how often the top-1 ids agree."""
    log_probs_NV = random_teacher(9, 25, 8)
    targets = truncate(log_probs_NV, top_k=7, samples=3)
    logits = (2 * _normal(9, 25, seed=7)).float()
    drawn = forward_kl(logits, targets, tail="samples")
    metrics = DENSE[kind](logits, targets).metrics
    assert metrics["kl"].item() == pytest.approx(drawn.loss_sum.item(), rel=1e-5)
    assert metrics == drawn.metrics
    assert metrics == forward_kl(logits, targets, tail="renormalised").metrics
    whole = truncate(log_probs_NV, top_k=25)
    even = dataclasses.replace(
        whole,
        topk_ids_NK=log_probs_NV.argsort(descending=True),
        topk_log_probs_NK=log_probs_NV.sort(descending=True).values.float(),
        tail_log_mass_N=torch.full((9,), -math.inf),
    )
    exact = full_kl(log_probs_NV, logits.double())
    assert DENSE[kind](logits, even).metrics["kl"].item() == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("lm_weight", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_any_target_add_nothing(kind: DivergenceKind, lm_weight: float) -> None:
    targets = truncate(random_teacher(6, 20, 4), top_k=5, samples=2)
    masked = without_targets(targets, [0, 2, 3])
    left = targets.take(torch.tensor([1, 4, 5]))
    hidden_ND, weight_VD = _normal(6, 6, seed=1).float().requires_grad_(), _normal(20, 6, seed=2).float()
    terms = distillation_from_hidden(hidden_ND, weight_VD, masked, divergence=kind, lm_weight=lm_weight)
    fewer = distillation_from_hidden(hidden_ND[[1, 4, 5]], weight_VD, left, divergence=kind, lm_weight=lm_weight)
    torch.testing.assert_close(terms.loss_sum, fewer.loss_sum)
    for name, value in fewer.metrics.items():
        torch.testing.assert_close(terms.metrics[name], value)
    (gradient,) = torch.autograd.grad(terms.loss_sum, hidden_ND)
    assert not gradient[[0, 2, 3]].any()
    nothing = without_targets(targets, list(range(6)))
    terms = distillation_from_hidden(hidden_ND, weight_VD, nothing, divergence=kind, lm_weight=lm_weight)
    (gradient,) = torch.autograd.grad(terms.loss_sum, hidden_ND)
    assert terms.loss_sum.item() == 0.0
    assert not gradient.any()


class TestErrors:
    targets: SparseTargets = truncate(random_teacher(4, 20, 4), top_k=5, samples=2, temperatures=(2.0,))
    logits = torch.zeros(4, 20)
    hidden_ND, weight_VD = torch.zeros(4, 6), torch.zeros(20, 6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_temperature_without_normaliser(self, kind: str) -> None:
        with pytest.raises(
            TargetError, match=r"temperature 3 has no stored normaliser \(stored: 2\): capture the cache"
        ):
            DENSE[kind](self.logits, self.targets, temperature=3.0)
        without = truncate(random_teacher(4, 20, 4), top_k=5)
        with pytest.raises(TargetError, match=r"temperature 2 .*stored: none.* with 2 in capture.temperatures"):
            DENSE[kind](self.logits, without, temperature=2.0)

    @pytest.mark.parametrize("tail", ["samples", "renormalised"])
    def test_another_estimator_than_the_bucket(self, tail: str) -> None:
        for kind in KINDS[1:]:
            with pytest.raises(TargetError, match=f"tail '{tail}': {kind} supports only 'bucket'"):
                distillation_from_hidden(
                    self.hidden_ND,
                    self.weight_VD,
                    self.targets,
                    divergence=kind,
                    tail=tail,  # type: ignore[arg-type]
                )

    def test_an_infinite_reverse_kl(self) -> None:
        """Where the teacher's tail has no mass, the student's has none only if the top-k holds every id."""
        tailless = dataclasses.replace(self.targets, tail_log_mass_N=torch.tensor([-1.0, -math.inf, -1.0, -math.inf]))
        with pytest.raises(TargetError, match=r"reverse_kl is infinite at 2 positions.*: use skewed_reverse_kl or js"):
            reverse_kl(self.logits, tailless)
        log_probs = self.targets.topk_log_probs_NK.clone()
        log_probs[0, 4] = -math.inf
        with pytest.raises(TargetError, match="infinite at 1 position"):
            reverse_kl(self.logits, dataclasses.replace(self.targets, topk_log_probs_NK=log_probs))
        for kind in ("js", "skewed_forward_kl", "skewed_reverse_kl", "total_variation"):
            assert math.isfinite(DENSE[kind](self.logits, tailless).loss_sum.item())

    def test_unknown_kinds_and_weights_out_of_range(self) -> None:
        with pytest.raises(TargetError, match="'kl' is unknown: choose one of forward_kl, reverse_kl, js"):
            distillation_from_hidden(self.hidden_ND, self.weight_VD, self.targets, divergence="kl")  # type: ignore[arg-type]
        with pytest.raises(TargetError, match="js_weight is 1: expected 0 < js_weight < 1"):
            jensen_shannon(self.logits, self.targets, weight=1.0)
        with pytest.raises(TargetError, match="skew is 0: expected"):
            skewed_forward_kl(self.logits, self.targets, skew=0.0)
        with pytest.raises(TargetError, match="temperature nan"):
            reverse_kl(self.logits, self.targets, temperature=math.nan)
