"""Divergences between a cached teacher and a student, from the student's logits, in value and gradient.

Letters: N positions, V vocabulary, K slots of the head, M slots of tail draws. Everything is in nats.

One position: teacher p with its head exact and tail mass r; student q. The readings of the tail differ in the target p̂,
whose gradient in the logits is q − p̂:

- `bucket`: the tail is one event. p̂ spreads r by the student's own tail shape. A lower bound of the full divergence.
- `draws`: p̂ puts r on the ids drawn from the tail, by their weights: unbiased in value and gradient. A position with a
  tail but no draw is read as a bucket. Source: random-sampling distillation, arXiv 2503.16870.
- `renormalised`: the tail is forgotten and the head scaled up to 1. Biased; the baseline that others use.

A temperature T divides the student's logits and raises the teacher's probabilities to 1/T; the stored normaliser makes
that exact in the head and in the mass. Losses are multiplied by T², so that gradients keep their scale.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets

Tail = Literal["bucket", "draws", "renormalised"]
TAILS: tuple[str, ...] = get_args(Tail)
METRICS = ("kl", "teacher_tail", "student_tail", "entropy", "top1_agreement")
NEVER = float("-inf")


@dataclass(frozen=True)
class Divergence:
    """A divergence summed over `count` positions, × T²; `metrics` are detached sums over the same positions.

    `kl`: the best estimate of the full forward KL that the records allow: with tail draws and at T = 1 the unbiased one
    with the stored entropy (a sum can fall below 0), else the bucket's lower bound at T. `teacher_tail` and
    `student_tail`: the mass outside the teacher's head. `entropy`: the teacher's at T = 1. `top1_agreement`: positions
    whose most likely token is the same.
    """

    loss_sum: Tensor
    count: int
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class TeacherAt:
    """The teacher at one temperature, normalised over what the reading keeps; empty slots hold id 0 and weight 0."""

    head_ids_NK: Tensor
    head_valid_NK: Tensor
    head_log_probs_NK: Tensor
    tail_log_mass_N: Tensor
    draw_ids_NM: Tensor
    draw_weights_NM: Tensor
    entropy_N: Tensor
    temperature: float
    tail: Tail

    def __getitem__(self, rows: slice) -> TeacherAt:
        """A slice of the positions."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        sliced: dict[str, Any] = {name: value[rows] for name, value in values if isinstance(value, Tensor)}
        return replace(self, **sliced)


def forward_kl(
    logits_NV: Tensor, targets: SparseTargets, *, tail: Tail = "bucket", temperature: float = 1.0
) -> Divergence:
    """Forward KL(teacher ‖ student) over cached targets, summed over positions, times T².

    Shapes: `logits_NV` [N, V] float, any float dtype (computed in float32); logits of ids ≥ `targets.vocab_size` count
    as −∞. `bucket` is ≥ 0 and 0 when the student equals the teacher; so is every reading of records without a tail.
    Errors: `TargetError` if an id lies beyond V, `temperature` has no stored normaliser, or the records have a tail but
    no draws that `draws` could use at that temperature.
    """
    vocab = checked_vocabulary(targets, logits_NV.shape[1])
    teacher = teacher_at(targets, vocab, tail=tail, temperature=temperature)
    metrics = no_metrics(logits_NV.device)
    loss_sum = _ForwardKL.apply(logits_NV, teacher, vocab, metrics)  # type: ignore[no-untyped-call]
    return Divergence(loss_sum, len(targets), metrics)


def no_metrics(device: torch.device) -> dict[str, Tensor]:
    """The metrics of no position: zeros to add to."""
    return {name: torch.zeros((), dtype=torch.float32, device=device) for name in METRICS}


def checked_vocabulary(targets: SparseTargets, head_rows: int) -> int:
    """The number of ids the divergence ranges over. Errors: `TargetError` if a target's id is beyond the head."""
    if targets.vocab_size <= head_rows:
        return targets.vocab_size
    ids = (targets.head_ids_NK, targets.draw_ids_NM, targets.target_ids_N)
    largest = max((int(tensor.max()) for tensor in ids if tensor.numel()), default=EMPTY_ID)
    if largest >= head_rows:
        raise TargetError(
            f"target id {largest} lies beyond the student's head of {head_rows} rows (the cache has a vocabulary of "
            f"{targets.vocab_size}): use a student with the teacher's vocabulary, or capture with a smaller one"
        )
    return head_rows


def teacher_at(targets: SparseTargets, vocab: int, *, tail: Tail, temperature: float) -> TeacherAt:
    """Bring the records to a temperature and a reading of the tail. Errors: `TargetError`, see `forward_kl`."""
    if tail not in TAILS:
        raise TargetError(f"tail reading '{tail}' is unknown: choose one of {', '.join(TAILS)}")
    if temperature <= 0:
        raise TargetError(f"temperature {temperature:g}: expected a number above 0")
    valid_NK = targets.head_ids_NK != EMPTY_ID
    normaliser_N = targets.log_normaliser_N(temperature).double()
    log_probs_NK = targets.head_log_probs_NK.double() / temperature - normaliser_N[:, None]
    log_probs_NK = log_probs_NK.masked_fill(~valid_NK, NEVER)
    tail_N = targets.tail_log_mass_N.double()
    if temperature != 1.0:
        mass_N = (1.0 - log_probs_NK.exp().sum(-1)).clamp(min=0.0)
        tail_N = torch.where(torch.isneginf(tail_N), tail_N, mass_N.log())
    # A head that holds the whole vocabulary leaves no tail, whatever rounding says.
    no_tail = valid_NK.sum(-1) >= vocab
    tail_N = tail_N.masked_fill(no_tail | (tail == "renormalised"), NEVER)
    draw_ids_NM, draw_weights_NM = _usable_draws(targets, tail_N, tail, temperature)
    # Stored log-probs are rounded: the target is made to sum to 1 exactly, so that the divergence cannot be negative.
    total_N = torch.logaddexp(log_probs_NK.logsumexp(-1) if valid_NK.shape[1] else tail_N.new_full((), NEVER), tail_N)
    total_N = total_N.masked_fill(torch.isneginf(total_N), 0.0)
    return TeacherAt(
        head_ids_NK=targets.head_ids_NK.clamp(min=0),
        head_valid_NK=valid_NK,
        head_log_probs_NK=(log_probs_NK - total_N[:, None]).float(),
        tail_log_mass_N=(tail_N - total_N).float(),
        draw_ids_NM=draw_ids_NM,
        draw_weights_NM=draw_weights_NM,
        entropy_N=targets.entropy_N,
        temperature=temperature,
        tail=tail,
    )


def divergence_in_place(
    logits_NV: Tensor,
    teacher: TeacherAt,
    metrics: dict[str, Tensor],
    *,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    target_ids_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace float32 logits by the gradient of kd_weight · divergence · T² + lm_weight · cross-entropy.

    Returns the two unweighted sums (the divergence times T²) and adds to `metrics`. No further [N, V] tensor is made,
    unless T ≠ 1 and both parts are asked for: their softmaxes differ then.
    """
    temperature = teacher.temperature
    if lm_weight and temperature != 1.0:
        assert target_ids_N is not None
        apart_NV = logits_NV.clone()
        cross_entropy = cross_entropy_in_place(apart_NV, target_ids_N, weight=lm_weight)
        divergence, _ = divergence_in_place(logits_NV, teacher, metrics, kd_weight=kd_weight)
        logits_NV.add_(apart_NV)
        return divergence, cross_entropy
    if temperature != 1.0:
        logits_NV.div_(temperature)
    head_NK, draws_NM = logits_NV.gather(1, teacher.head_ids_NK), logits_NV.gather(1, teacher.draw_ids_NM)
    head_NK = head_NK.masked_fill(~teacher.head_valid_NK, NEVER)
    actual_N1 = logits_NV.gather(1, target_ids_N[:, None]) if target_ids_N is not None else None

    # With the head masked, one pass over V gives the tail's normaliser without cancellation, and the head's is small.
    logits_NV.scatter_add_(1, teacher.head_ids_NK, torch.zeros_like(head_NK).masked_fill(teacher.head_valid_NK, NEVER))
    peak_N = logits_NV.amax(-1)
    shift_N = peak_N.masked_fill(torch.isneginf(peak_N), 0.0)
    tail_sum_N = logits_NV.sub_(shift_N[:, None]).exp_().sum(-1)
    tail_lse_N = tail_sum_N.log() + shift_N
    lse_N = torch.logaddexp(head_NK.logsumexp(-1), tail_lse_N) if head_NK.shape[1] else tail_lse_N
    student_head_NK = (head_NK - lse_N[:, None]).exp()
    student_tail_N = (tail_lse_N - lse_N).exp()

    # Value.
    teacher_head_NK, teacher_tail_N = teacher.head_log_probs_NK.exp(), teacher.tail_log_mass_N.exp()
    drawn_N = (teacher.draw_weights_NM.sum(-1) > 0) & (teacher_tail_N > 0)
    head_cross_N = _weighted(teacher_head_NK, head_NK - lse_N[:, None])
    bucket_N = _weighted(teacher_head_NK, teacher.head_log_probs_NK) - head_cross_N
    bucket_N = bucket_N + _product(teacher_tail_N, teacher.tail_log_mass_N - (tail_lse_N - lse_N))
    draws_cross_N = teacher_tail_N * _weighted(teacher.draw_weights_NM, draws_NM - lse_N[:, None])
    best_N = torch.where(drawn_N, -head_cross_N - draws_cross_N - teacher.entropy_N, bucket_N)
    divergence = (best_N if teacher.tail == "draws" else bucket_N).sum() * temperature**2
    cross_entropy = (lse_N - actual_N1.squeeze(1)).sum() if lm_weight and actual_N1 is not None else lse_N.new_zeros(())

    # Gradient: q − p̂ times T for the divergence (T² of the loss over the T of the logits), q − y for cross-entropy.
    has_target_N = torch.isfinite(teacher.tail_log_mass_N) | teacher.head_valid_NK.any(-1)
    kd_N = kd_weight * temperature * has_target_N
    bucket_mass_N = torch.where(drawn_N, 0.0, teacher_tail_N) if teacher.tail == "draws" else teacher_tail_N
    tail_gradient_N = (kd_N + lm_weight) * student_tail_N - kd_N * bucket_mass_N
    logits_NV.mul_(torch.where(tail_sum_N > 0, tail_gradient_N / tail_sum_N, 0.0)[:, None])
    head_gradient_NK = (kd_N + lm_weight)[:, None] * student_head_NK - kd_N[:, None] * teacher_head_NK
    logits_NV.scatter_add_(1, teacher.head_ids_NK, head_gradient_NK)
    if teacher.tail == "draws":
        drawn_gradient_NM = -(kd_N * teacher_tail_N)[:, None] * teacher.draw_weights_NM
        logits_NV.scatter_add_(1, teacher.draw_ids_NM, drawn_gradient_NM)
    if lm_weight and target_ids_N is not None and actual_N1 is not None:
        logits_NV.scatter_add_(1, target_ids_N[:, None], torch.full_like(actual_N1, -lm_weight))

    agrees_N = head_NK[:, 0] >= torch.maximum(head_NK.amax(-1), peak_N) if head_NK.shape[1] else peak_N.new_zeros(0)
    values = (best_N, teacher_tail_N, student_tail_N, teacher.entropy_N, agrees_N)
    for name, value_N in zip(METRICS, values, strict=True):
        metrics[name] = metrics[name] + value_N.sum(dtype=torch.float32)
    return divergence, cross_entropy


def cross_entropy_in_place(logits_NV: Tensor, target_ids_N: Tensor, *, weight: float = 1.0) -> Tensor:
    """Replace float32 logits by weight · gradient of the summed cross-entropy; returns the unweighted sum."""
    target_N = logits_NV.gather(1, target_ids_N[:, None]).squeeze(1)
    peak_N = logits_NV.amax(-1)
    sum_N = logits_NV.sub_(peak_N[:, None]).exp_().sum(-1)
    loss = (sum_N.log() + peak_N - target_N).sum()
    logits_NV.mul_((weight / sum_N)[:, None])
    logits_NV.scatter_add_(1, target_ids_N[:, None], torch.full_like(target_N[:, None], -weight))
    return loss


def _usable_draws(targets: SparseTargets, tail_N: Tensor, tail: Tail, temperature: float) -> tuple[Tensor, Tensor]:
    """The draws as ids ≥ 0 and float32 weights, or none at a temperature they were not drawn at."""
    ids_NM = targets.draw_ids_NM
    if tail == "draws" and bool(torch.isfinite(tail_N).any()):
        if temperature != 1.0:
            raise TargetError(
                f"tail 'draws' at temperature {temperature:g}: the draws were made at temperature 1: "
                "set tail to 'bucket', or temperature to 1"
            )
        if ids_NM.shape[1] == 0:
            raise TargetError(
                "tail 'draws': the cache holds no tail draws: set tail to 'bucket', or capture with draws"
            )
    if temperature != 1.0 or tail == "renormalised":
        ids_NM = ids_NM[:, :0]
    weights_NM = targets.draw_weights_NM[:, : ids_NM.shape[1]].float()
    return ids_NM.clamp(min=0), weights_NM


def _product(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value, and 0 where the weight is 0, whatever the value."""
    return torch.where(weight > 0, weight * value, 0.0)


def _weighted(weights_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Σ_k weight · value, leaving slots of weight 0 out, whatever their value."""
    return _product(weights_NK, values_NK).sum(-1)


class _ForwardKL(torch.autograd.Function):
    """Dense logits in, summed divergence out; the gradient is computed with the value."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, teacher: TeacherAt, vocab: int, metrics: dict[str, Tensor]) -> Tensor:
        gradient_NV = torch.zeros_like(logits_NV, dtype=torch.float32)
        gradient_NV[:, :vocab] = logits_NV[:, :vocab]
        loss, _ = divergence_in_place(gradient_NV[:, :vocab], teacher, metrics)
        ctx.save_for_backward(gradient_NV.to(logits_NV.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.saved_tensors[0], None, None, None
