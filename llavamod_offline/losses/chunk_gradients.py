"""The gradient of a loss with respect to a chunk's logits, with one softmax for any divergence.

It is measured, planned and written. Measuring reads the logits; a loss and its gradient need only a few numbers per
row. Planning turns these into the loss and a `RowGradients`. The functions `…_in_place` do both, and write the gradient
over the same logits.

Shape suffixes: N positions, V vocabulary, K top-k slots, M tail sample slots, E = K + 1 events.

A divergence depends on the student only through the log-probs of a few events (see `bucketed_divergence.py`). Its
gradient is thus one number per top-k id and, in the tail, `own`·v − `pull`·m: v is the student's own tail shape, `pull`
is proportional to the teacher's tail mass, and m is the target shape of the tail: v itself for a bucket, the tail
samples, or a mixture of both and the teacher's mean tail (`TailPrior`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec, event_divergence, weighted
from llavamod_offline.losses.rows.gradients import RowGradients
from llavamod_offline.losses.rows.kernels import peaks_and_sums
from llavamod_offline.losses.tail_estimators import NEVER, PreparedTargets, TailPrior
from llavamod_offline.losses.targets import EMPTY_ID

METRICS = ("kl", "tail_kl", "teacher_tail", "student_tail", "entropy", "top1_agreement")
_LEAST_MASS = 1e-6  # of the profile outside the top-k: below it, rounding determines the shape
_FORWARD_KL = DivergenceSpec()
_ROWS_AT_TWO_TEMPERATURES = 32


def zero_metrics(device: torch.device) -> dict[str, Tensor]:
    """Metrics of 0 positions, to accumulate into."""
    return {name: torch.zeros((), dtype=torch.float32, device=device) for name in METRICS}


class Measured(NamedTuple):
    """What a loss needs from N rows of logits, each divided by the temperature.

    `topk_NK`, `tail_logits_NM`, `actual_N`: those of the record's ids and of the actual token (−inf in empty slots, and
    any number for an actual token of −1). `shift_N`: the largest of all others, 0 where there are none; `largest_N` is
    −inf there. `sum_N`: Σ exp(logit − shift) over these others.
    """

    topk_NK: Tensor
    tail_logits_NM: Tensor
    actual_N: Tensor
    largest_N: Tensor
    shift_N: Tensor
    sum_N: Tensor


def measure_divergence(logits_NV: Tensor, teacher: PreparedTargets, target_ids_N: Tensor) -> Measured:
    """Measure rows for `plan_divergence`; sets the top-k ids to −inf, and leaves all others unchanged."""
    temperature = teacher.temperature
    topk_NK, tail_logits_NM, actual_N = (p.div_(temperature) for p in _gathered(logits_NV, teacher, target_ids_N))
    # Masking the top-k gives the tail's normaliser without cancellation.
    _mask_topk(logits_NV, teacher)
    return Measured(topk_NK, tail_logits_NM, actual_N, *peaks_and_sums(logits_NV, temperature))


def measure_cross_entropy(logits_NV: Tensor, target_ids_N: Tensor) -> Measured:
    """Measure rows for `plan_cross_entropy`; leaves the logits unchanged."""
    actual_N = _gather_one(logits_NV, target_ids_N)
    return Measured(logits_NV[:, :0], logits_NV[:, :0], actual_N, *peaks_and_sums(logits_NV, 1.0))


def divergence_in_place(
    logits_NV: Tensor,
    teacher: PreparedTargets,
    metrics: dict[str, Tensor],
    *,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    target_ids_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    prior: TailPrior | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace float32 logits by the gradient of the summed kd_weight · divergence · T² + lm_weight · cross-entropy.

    Returns divergence · T² and cross-entropy, summed but not multiplied by their weights, and adds to `metrics`.
    `weights_N` weighs positions in all of these; `prior` is for the estimator `samples`. Allocates no other [N, V]
    tensor; with both losses at T ≠ 1, whose softmaxes differ, it copies a few rows at a time.
    """
    if lm_weight and teacher.temperature != 1.0:
        assert target_ids_N is not None
        return _at_two_temperatures(logits_NV, teacher, metrics, kd_weight, lm_weight, target_ids_N, weights_N, prior)
    if teacher.temperature != 1.0:
        logits_NV.div_(teacher.temperature)
    if target_ids_N is None:
        target_ids_N = logits_NV.new_full((len(logits_NV),), EMPTY_ID, dtype=torch.long)
    gathered = _gathered(logits_NV, teacher, target_ids_N)
    _mask_topk(logits_NV, teacher)
    measured = Measured(*gathered, *_exponentials_in_place(logits_NV))
    divergence, cross_entropy, gradients = plan_divergence(
        measured,
        teacher,
        metrics,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        target_ids_N=target_ids_N,
        weights_N=weights_N,
        prior=prior,
    )
    gradients.write_over_exponentials(logits_NV)
    return divergence, cross_entropy


def plan_divergence(
    measured: Measured,
    teacher: PreparedTargets,
    metrics: dict[str, Tensor],
    *,
    kd_weight: float,
    lm_weight: float,
    target_ids_N: Tensor,
    weights_N: Tensor | None,
    prior: TailPrior | None,
) -> tuple[Tensor, Tensor, RowGradients]:
    """The sums that `divergence_in_place` returns, and the gradient that it writes; adds to `metrics`."""
    temperature = teacher.temperature
    topk_NK, tail_logits_NM, actual_N, largest_N, shift_N, tail_sum_N = measured
    events_NE = torch.cat([topk_NK, (tail_sum_N.log() + shift_N)[:, None]], 1)
    lse_N = events_NE.logsumexp(-1)
    log_q_NE = events_NE - lse_N[:, None]

    full_kl_N = _full_kl(teacher, log_q_NE, tail_logits_NM - lse_N[:, None])
    value_N, slope_NE = event_divergence(teacher.log_probs_NE, log_q_NE, teacher.spec)
    if teacher.tail == "samples":
        value_N = full_kl_N

    # T² of the loss divided by T of the logits; rows without a target would have infinite slopes.
    weight_N = torch.ones_like(lse_N) if weights_N is None else weights_N
    rate_N = torch.where(teacher.has_target_N, kd_weight * temperature * weight_N, 0.0)
    slope_NE = torch.where(teacher.has_target_N[:, None], rate_N[:, None] * slope_NE, 0.0)
    token_N = weight_N.masked_fill(target_ids_N == EMPTY_ID, 0.0)
    own_NE = (lm_weight * token_N - slope_NE.sum(-1))[:, None] * log_q_NE.exp()
    ids, values = [teacher.topk_ids_NK], [own_NE[:, :-1] + slope_NE[:, :-1]]
    own_N, pull_N = own_NE[:, -1], -slope_NE[:, -1]
    mass_N, per_mass_N = own_N - pull_N, None
    if teacher.tail == "samples":
        sampled_N = torch.where(teacher.has_samples_N, pull_N, 0.0)
        mass_N = own_N - (pull_N - sampled_N)
        if prior is not None:
            sampled_N, per_mass_N, profile_NK = _mixed(sampled_N, teacher, prior)
            values[0] = values[0] + profile_NK
        ids.append(teacher.tail_ids_NM)
        values.append(-sampled_N[:, None] * teacher.tail_weights_NM)
    cross_entropy = lse_N.new_zeros(())
    if lm_weight:
        ids.append(target_ids_N.clamp(min=0)[:, None])
        values.append(-lm_weight * token_N[:, None])
        cross_entropy = weighted(token_N, lse_N - actual_N).sum()
    gradients = RowGradients(
        temperature=temperature,
        shift_N=shift_N,
        scale_N=torch.where(tail_sum_N > 0, mass_N / tail_sum_N, 0.0),
        masked_ids_NK=teacher.topk_ids_NK.masked_fill(~teacher.topk_valid_NK, EMPTY_ID),
        ids_NX=torch.cat(ids, 1),
        values_NX=torch.cat(values, 1),
        per_mass_N=per_mass_N,
        profile_V=None if prior is None or per_mass_N is None else prior.profile_V,
    )

    divergence = weighted(torch.where(teacher.has_target_N, weight_N, 0.0), value_N).sum() * temperature**2
    known_N = torch.isfinite(teacher.full_log_probs_NE).any(-1)
    agrees_N = (
        topk_NK[:, 0] >= torch.maximum(topk_NK.amax(-1), largest_N) if topk_NK.shape[1] else torch.zeros_like(lse_N)
    )
    teacher_tail_N, student_tail_N = teacher.full_log_probs_NE[:, -1].exp(), log_q_NE[:, -1].exp()
    tail_kl_N = full_kl_N - _topk_kl(teacher, log_q_NE)
    metric_values = (full_kl_N, tail_kl_N, teacher_tail_N, student_tail_N, teacher.entropy_N, agrees_N)
    for name, metric_N in zip(METRICS, metric_values, strict=True):
        metrics[name] = metrics[name] + weighted(weight_N * known_N, metric_N).sum(dtype=torch.float32)
    return divergence, cross_entropy, gradients


def cross_entropy_in_place(
    logits_NV: Tensor, target_ids_N: Tensor, *, weight: float = 1.0, weights_N: Tensor | None = None
) -> Tensor:
    """Replace float32 logits by weight · the gradient of the summed cross-entropy; returns the sum without `weight`.

    `weights_N` weighs positions; those with target −1 add nothing.
    """
    actual_N = _gather_one(logits_NV, target_ids_N)
    measured = Measured(logits_NV[:, :0], logits_NV[:, :0], actual_N, *_exponentials_in_place(logits_NV))
    loss, gradients = plan_cross_entropy(measured, target_ids_N, weight=weight, weights_N=weights_N)
    gradients.write_over_exponentials(logits_NV)
    return loss


def plan_cross_entropy(
    measured: Measured, target_ids_N: Tensor, *, weight: float = 1.0, weights_N: Tensor | None = None
) -> tuple[Tensor, RowGradients]:
    """The sum that `cross_entropy_in_place` returns, and the gradient that it writes."""
    weight_N = torch.ones_like(measured.sum_N) if weights_N is None else weights_N
    weight_N = weight_N.masked_fill(target_ids_N == EMPTY_ID, 0.0)
    loss = (weight_N * (measured.sum_N.log() + measured.shift_N - measured.actual_N)).sum()
    gradients = RowGradients(
        temperature=1.0,
        shift_N=measured.shift_N,
        scale_N=weight * weight_N / measured.sum_N,
        masked_ids_NK=target_ids_N.new_zeros(len(target_ids_N), 0),
        ids_NX=target_ids_N.clamp(min=0)[:, None],
        values_NX=-weight * weight_N[:, None],
    )
    return loss, gradients


def _at_two_temperatures(
    logits_NV: Tensor,
    teacher: PreparedTargets,
    metrics: dict[str, Tensor],
    kd_weight: float,
    lm_weight: float,
    target_ids_N: Tensor,
    weights_N: Tensor | None,
    prior: TailPrior | None,
) -> tuple[Tensor, Tensor]:
    divergence, cross_entropy = logits_NV.new_zeros(()), logits_NV.new_zeros(())
    for start in range(0, len(logits_NV), _ROWS_AT_TWO_TEMPERATURES):
        rows = slice(start, start + _ROWS_AT_TWO_TEMPERATURES)
        weights_R = None if weights_N is None else weights_N[rows]
        apart_RV = logits_NV[rows].clone()
        cross_entropy += cross_entropy_in_place(apart_RV, target_ids_N[rows], weight=lm_weight, weights_N=weights_R)
        part, _ = divergence_in_place(
            logits_NV[rows], teacher[rows], metrics, kd_weight=kd_weight, weights_N=weights_R, prior=prior
        )
        divergence += part
        logits_NV[rows].add_(apart_RV)
    return divergence, cross_entropy


def _full_kl(teacher: PreparedTargets, log_q_NE: Tensor, tail_log_q_NM: Tensor) -> Tensor:
    """Estimate the forward KL over the whole vocabulary: by tail samples where available, else bucketed."""
    bucketed_N, _ = event_divergence(teacher.full_log_probs_NE, log_q_NE, _FORWARD_KL)
    if not teacher.tail_ids_NM.shape[1]:
        return bucketed_N
    p_NE = teacher.full_log_probs_NE.exp()
    topk_N = weighted(p_NE[:, :-1], log_q_NE[:, :-1]).sum(-1)
    tail_N = p_NE[:, -1] * weighted(teacher.tail_weights_NM, tail_log_q_NM).sum(-1)
    return torch.where(teacher.has_samples_N, -topk_N - tail_N - teacher.entropy_N, bucketed_N)


def _topk_kl(teacher: PreparedTargets, log_q_NE: Tensor) -> Tensor:
    """What the top-k ids contribute to the forward KL."""
    log_p_NK = teacher.full_log_probs_NE[:, :-1]
    gap_NK = (log_p_NK - log_q_NE[:, :-1]).masked_fill(~teacher.topk_valid_NK, 0.0)
    return weighted(log_p_NK.exp(), gap_NK).sum(-1)


def _mixed(sampled_N: Tensor, teacher: PreparedTargets, prior: TailPrior) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the tail's target between its samples and the prior's profile.

    Returns the samples' part [N], the profile's factor [N], and what the profile would give the top-k ids [N, K], where
    it does not belong. Positions whose top-k covers the profile use the samples alone.
    """
    profile_NK = torch.where(teacher.topk_valid_NK, prior.profile_V[teacher.topk_ids_NK], 0.0)
    outside_N = prior.profile_V.sum() - profile_NK.sum(-1)
    mixed_N = torch.where(outside_N > _LEAST_MASS, prior.share * sampled_N, 0.0)
    per_mass_N = torch.where(mixed_N > 0, mixed_N / outside_N, 0.0)
    return sampled_N - mixed_N, per_mass_N, per_mass_N[:, None] * profile_NK


def _gathered(logits_NV: Tensor, teacher: PreparedTargets, target_ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    topk_NK = logits_NV.gather(1, teacher.topk_ids_NK).masked_fill_(~teacher.topk_valid_NK, NEVER)
    return topk_NK, logits_NV.gather(1, teacher.tail_ids_NM), _gather_one(logits_NV, target_ids_N)


def _mask_topk(logits_NV: Tensor, teacher: PreparedTargets) -> None:
    never_NK = torch.zeros_like(teacher.log_probs_NE[:, :-1]).masked_fill_(teacher.topk_valid_NK, NEVER)
    logits_NV.scatter_add_(1, teacher.topk_ids_NK, never_NK)


def _exponentials_in_place(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits by their shifted exponentials: each row's largest logit, shift and sum."""
    largest_N = logits_NV.amax(-1)
    shift_N = largest_N.masked_fill(torch.isneginf(largest_N), 0.0)
    return largest_N, shift_N, logits_NV.sub_(shift_N[:, None]).exp_().sum(-1)


def _gather_one(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """The logit of one id per row; of id 0 where the id is −1."""
    return logits_NV.gather(1, ids_N.clamp(min=0)[:, None]).squeeze(1)
