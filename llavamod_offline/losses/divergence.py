"""Divergences between a cached teacher and a student, computed from the student's logits.

Shape suffixes: N positions, V vocabulary. All values are in nats.

The forward KL has three tail estimators (see `tail_estimators.py`); all other divergences are defined on the top-k ids
and one bucket for the tail (see `bucketed_divergence.py` for their formulas). A temperature T divides the student's
logits and raises the teacher's probabilities to 1/T; losses are multiplied by T² to keep the scale of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.chunk_gradients import divergence_in_place, zero_metrics
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.tail_estimators import TailPrior, checked_vocabulary, prepare_targets
from llavamod_offline.losses.targets import SparseTargets


@dataclass(frozen=True)
class Divergence:
    """A divergence summed over `count` positions, times T², with metrics: detached sums over the same positions.

    `kl`: the best available estimate of the full forward KL, for every divergence. With tail samples of this T it is
    unbiased and uses the stored entropy (it can fall below 0), otherwise the lower bound of the bucket at T.
    `tail_kl`: what the tail contributes to it. `teacher_tail`, `student_tail`: the mass outside the teacher's top-k.
    `entropy`: the teacher's, at its samples' T.
    `top1_agreement`: the number of positions where teacher and student have the same most likely token.
    """

    loss_sum: Tensor
    count: int
    metrics: dict[str, Tensor]


def forward_kl(
    logits_NV: Tensor,
    targets: SparseTargets,
    *,
    tail: TailEstimator = "bucket",
    prior: TailPrior | None = None,
    temperature: float = 1.0,
) -> Divergence:
    """Forward KL(teacher ‖ student) over cached targets, summed over positions, times T².

    Shapes: `logits_NV` [N, V] of any float dtype (computed in float32); logits of ids ≥ `targets.vocab_size` count as
    −∞. `tail`, and `prior` for `samples`: see `tail_estimators.py`.
    Errors: `TargetError` if an id lies beyond V, `temperature` has no stored normaliser, `samples` finds no tail
    samples for that temperature, or `prior` was made for another vocabulary.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("forward_kl"), temperature, tail, prior)


def reverse_kl(logits_NV: Tensor, targets: SparseTargets, *, temperature: float = 1.0) -> Divergence:
    """Reverse KL(student ‖ teacher) over top-k and bucket, summed over positions, times T².

    Shapes: as `forward_kl`. Source: MiniLLM, arXiv 2306.08543, on the cached support.
    Errors: `TargetError` as `forward_kl`, or if it is infinite because a record assigns some ids no probability.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("reverse_kl"), temperature)


def jensen_shannon(
    logits_NV: Tensor, targets: SparseTargets, *, weight: float = 0.5, temperature: float = 1.0
) -> Divergence:
    """w·KL(teacher ‖ m) + (1 − w)·KL(student ‖ m), m = w·teacher + (1 − w)·student, over top-k and bucket, times T².

    `weight` is w in (0, 1); summed over positions. Shapes and errors: as `forward_kl`. Source: GKD, arXiv 2306.13649.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("js", js_weight=weight), temperature)


def skewed_forward_kl(
    logits_NV: Tensor, targets: SparseTargets, *, skew: float = 0.1, temperature: float = 1.0
) -> Divergence:
    """KL(teacher ‖ α·teacher + (1 − α)·student) over top-k and bucket, summed over positions, times T².

    `skew` is α in (0, 1). Shapes and errors: as `forward_kl`. Source: DistiLLM, arXiv 2402.03898.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("skewed_forward_kl", skew=skew), temperature)


def skewed_reverse_kl(
    logits_NV: Tensor, targets: SparseTargets, *, skew: float = 0.1, temperature: float = 1.0
) -> Divergence:
    """KL(student ‖ (1 − α)·teacher + α·student) over top-k and bucket, summed over positions, times T².

    `skew` is α in (0, 1). Shapes and errors: as `forward_kl`. Source: DistiLLM, arXiv 2402.03898.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("skewed_reverse_kl", skew=skew), temperature)


def total_variation(logits_NV: Tensor, targets: SparseTargets, *, temperature: float = 1.0) -> Divergence:
    """Half the L1 distance between teacher and student over top-k and bucket, summed over positions, times T².

    Shapes and errors: as `forward_kl`. Events to which both assign the same probability have gradient 0.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("total_variation"), temperature)


def _divergence(
    logits_NV: Tensor,
    targets: SparseTargets,
    spec: DivergenceSpec,
    temperature: float,
    tail: TailEstimator = "bucket",
    prior: TailPrior | None = None,
) -> Divergence:
    vocab = checked_vocabulary(targets, logits_NV.shape[1])
    teacher = prepare_targets(targets, vocab, spec=spec, tail=tail, temperature=temperature)
    prior = None if prior is None else prior.on(logits_NV.device, vocab)
    metrics = zero_metrics(logits_NV.device)

    def in_place(gradient_NV: Tensor) -> Tensor:
        return divergence_in_place(gradient_NV, teacher, metrics, prior=prior)[0]

    loss_sum = _Dense.apply(logits_NV, vocab, in_place)  # type: ignore[no-untyped-call]
    return Divergence(loss_sum, len(targets), metrics)


class _Dense(torch.autograd.Function):
    """Dense logits → summed divergence; the forward pass computes the gradient as well."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, vocab: int, in_place: Callable[[Tensor], Tensor]) -> Tensor:
        gradient_NV = torch.zeros_like(logits_NV, dtype=torch.float32)
        gradient_NV[:, :vocab] = logits_NV[:, :vocab]
        loss = in_place(gradient_NV[:, :vocab])
        ctx.save_for_backward(gradient_NV.to(logits_NV.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.saved_tensors[0], None, None
