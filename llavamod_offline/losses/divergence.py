"""Divergences between a cached teacher and a student, from the student's logits, in value and gradient.

Shape suffixes: N positions, V vocabulary. Everything is in nats.

The forward KL reads the tail in one of four ways (see `teacher.py`); all others are defined on head and
bucket (see `events.py` for their formulas). A temperature T divides the student's logits and raises the teacher's
probabilities to 1/T. Losses are multiplied by T², so that gradients keep their scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.chunk_gradients import divergence_in_place, shrinkage_for, zero_metrics
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.shrinkage import Shrinkage
from llavamod_offline.losses.tail_estimators import checked_vocabulary, prepare_targets
from llavamod_offline.losses.targets import SparseTargets


@dataclass(frozen=True)
class Divergence:
    """A divergence summed over `count` positions, × T²; `metrics` are detached sums over the same positions.

    `kl`: the best estimate of the full forward KL that the records allow, whatever the divergence: with tail draws and
    at T = 1 the unbiased one with the stored entropy (a sum can fall below 0), else the bucket's lower bound at T.
    `teacher_tail` and `student_tail`: the mass outside the teacher's head. `entropy`: the teacher's at T = 1.
    `top1_agreement`: positions whose most likely token is the same.
    """

    loss_sum: Tensor
    count: int
    metrics: dict[str, Tensor]


def forward_kl(
    logits_NV: Tensor,
    targets: SparseTargets,
    *,
    tail: TailEstimator = "bucket",
    shrinkage: Shrinkage | None = None,
    temperature: float = 1.0,
) -> Divergence:
    """Forward KL(teacher ‖ student) over cached targets, summed over positions, times T².

    Shapes: `logits_NV` [N, V] float, any float dtype (computed in float32); logits of ids ≥ `targets.vocab_size` count
    as −∞. `bucket` is ≥ 0 and 0 when the student equals the teacher; so is every reading of records without a tail.
    `shrinkage` belongs to the reading `shrink`, and learns where gradients are on; of the hidden states it knows none.
    Errors: `TargetError` if an id lies beyond V, `temperature` has no stored normaliser, the records have a tail but no
    draws that `draws` could use at that temperature, or `shrink` has no state for this vocabulary.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("forward_kl"), temperature, tail, shrinkage)


def reverse_kl(logits_NV: Tensor, targets: SparseTargets, *, temperature: float = 1.0) -> Divergence:
    """Reverse KL(student ‖ teacher) on head and bucket, summed over positions, times T²; shapes as `forward_kl`.

    Source: MiniLLM, arXiv 2306.08543, on the cached support. Errors: `TargetError` as `forward_kl`, or if it is
    infinite, since the teacher gives ids no probability that the student can.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("reverse_kl"), temperature)


def jensen_shannon(
    logits_NV: Tensor, targets: SparseTargets, *, weight: float = 0.5, temperature: float = 1.0
) -> Divergence:
    """w·KL(teacher ‖ m) + (1 − w)·KL(student ‖ m), m = w·teacher + (1 − w)·student, on head and bucket, times T².

    `weight` w in (0, 1); summed over positions; shapes and errors as `forward_kl`. Source: GKD, arXiv 2306.13649.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("js", js_weight=weight), temperature)


def skewed_forward_kl(
    logits_NV: Tensor, targets: SparseTargets, *, skew: float = 0.1, temperature: float = 1.0
) -> Divergence:
    """KL(teacher ‖ α·teacher + (1 − α)·student) on head and bucket, summed over positions, times T².

    `skew` α in (0, 1); shapes and errors as `forward_kl`. Source: DistiLLM, arXiv 2402.03898.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("skewed_forward_kl", skew=skew), temperature)


def skewed_reverse_kl(
    logits_NV: Tensor, targets: SparseTargets, *, skew: float = 0.1, temperature: float = 1.0
) -> Divergence:
    """KL(student ‖ (1 − α)·teacher + α·student) on head and bucket, summed over positions, times T².

    `skew` α in (0, 1); shapes and errors as `forward_kl`. Source: DistiLLM, arXiv 2402.03898.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("skewed_reverse_kl", skew=skew), temperature)


def total_variation(logits_NV: Tensor, targets: SparseTargets, *, temperature: float = 1.0) -> Divergence:
    """Half the L1 distance of teacher and student on head and bucket, summed over positions, times T².

    Shapes and errors as `forward_kl`. An event that both give the same probability has a slope of 0.
    """
    return _divergence(logits_NV, targets, DivergenceSpec("total_variation"), temperature)


def _divergence(
    logits_NV: Tensor,
    targets: SparseTargets,
    spec: DivergenceSpec,
    temperature: float,
    tail: TailEstimator = "bucket",
    shrinkage: Shrinkage | None = None,
) -> Divergence:
    vocab = checked_vocabulary(targets, logits_NV.shape[1])
    teacher = prepare_targets(targets, vocab, spec=spec, tail=tail, temperature=temperature)
    state = shrinkage_for(teacher, shrinkage, vocab, logits_NV.device)
    learns = state is not None and torch.is_grad_enabled()
    metrics = zero_metrics(logits_NV.device)

    def in_place(gradient_NV: Tensor) -> Tensor:
        features_N1 = torch.ones_like(gradient_NV[:, :1]) if learns else None
        return divergence_in_place(gradient_NV, teacher, metrics, shrinkage=state, features_NJ=features_N1)[0]

    loss_sum = _Dense.apply(logits_NV, vocab, in_place)  # type: ignore[no-untyped-call]
    return Divergence(loss_sum, len(targets), metrics)


class _Dense(torch.autograd.Function):
    """Dense logits in, summed divergence out; the gradient is computed with the value."""

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
