"""Replace a chunk's logits by the gradient of a loss, in place and with one softmax for any divergence.

Shape suffixes: N positions, V vocabulary, K top-k slots, M tail sample slots, E = K + 1 events.

A divergence depends on the student only through the log-probs of a few events (see `bucketed_divergence.py`). Its
gradient is thus one number per top-k id and, in the tail, `own`·v − `pull`·m: v is the student's own tail shape, `pull`
is proportional to the teacher's tail mass, and m is the target shape of the tail: v itself for a bucket, the tail
samples, or a mixture of both and the teacher's mean tail (`TailPrior`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec, event_divergence, weighted
from llavamod_offline.losses.tail_estimators import NEVER, PreparedTargets, TailPrior
from llavamod_offline.losses.targets import EMPTY_ID

METRICS = ("kl", "tail_kl", "teacher_tail", "student_tail", "entropy", "top1_agreement")
_LEAST_MASS = 1e-6  # of the profile outside the top-k: below it, rounding determines the shape
_FORWARD_KL = DivergenceSpec()
_ROWS_AT_TWO_TEMPERATURES = 32


def zero_metrics(device: torch.device) -> dict[str, Tensor]:
    """Metrics of 0 positions, to accumulate into."""
    return {name: torch.zeros((), dtype=torch.float32, device=device) for name in METRICS}


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
    temperature = teacher.temperature
    if temperature != 1.0:
        logits_NV.div_(temperature)
    actual_N = _gather_one(logits_NV, target_ids_N) if lm_weight and target_ids_N is not None else None
    tail_logits_NM = logits_NV.gather(1, teacher.tail_ids_NM)
    topk_NK = logits_NV.gather(1, teacher.topk_ids_NK).masked_fill(~teacher.topk_valid_NK, NEVER)

    # Masking the top-k gives the tail's normaliser in one pass over V, without cancellation.
    logits_NV.scatter_add_(1, teacher.topk_ids_NK, torch.zeros_like(topk_NK).masked_fill(teacher.topk_valid_NK, NEVER))
    peak_N = logits_NV.amax(-1)
    shift_N = peak_N.masked_fill(torch.isneginf(peak_N), 0.0)
    tail_sum_N = logits_NV.sub_(shift_N[:, None]).exp_().sum(-1)
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
    token_N = weight_N if target_ids_N is None else weight_N.masked_fill(target_ids_N == EMPTY_ID, 0.0)
    own_NE = (lm_weight * token_N - slope_NE.sum(-1))[:, None] * log_q_NE.exp()
    topk_gradient_NK = own_NE[:, :-1] + slope_NE[:, :-1]
    own_N, pull_N = own_NE[:, -1], -slope_NE[:, -1]
    if teacher.tail == "samples":
        topk_gradient_NK += _sampled_tail(logits_NV, own_N, pull_N, tail_sum_N, teacher, prior)
    else:
        _scale_tail(logits_NV, own_N - pull_N, tail_sum_N)
    logits_NV.scatter_add_(1, teacher.topk_ids_NK, topk_gradient_NK)
    cross_entropy = lse_N.new_zeros(())
    if actual_N is not None and target_ids_N is not None:
        logits_NV.scatter_add_(1, target_ids_N.clamp(min=0)[:, None], -lm_weight * token_N[:, None])
        cross_entropy = weighted(token_N, lse_N - actual_N).sum()

    divergence = weighted(torch.where(teacher.has_target_N, weight_N, 0.0), value_N).sum() * temperature**2
    known_N = torch.isfinite(teacher.full_log_probs_NE).any(-1)
    agrees_N = topk_NK[:, 0] >= torch.maximum(topk_NK.amax(-1), peak_N) if topk_NK.shape[1] else torch.zeros_like(lse_N)
    teacher_tail_N, student_tail_N = teacher.full_log_probs_NE[:, -1].exp(), log_q_NE[:, -1].exp()
    tail_kl_N = full_kl_N - _topk_kl(teacher, log_q_NE)
    values = (full_kl_N, tail_kl_N, teacher_tail_N, student_tail_N, teacher.entropy_N, agrees_N)
    for name, metric_N in zip(METRICS, values, strict=True):
        metrics[name] = metrics[name] + weighted(weight_N * known_N, metric_N).sum(dtype=torch.float32)
    return divergence, cross_entropy


def cross_entropy_in_place(
    logits_NV: Tensor, target_ids_N: Tensor, *, weight: float = 1.0, weights_N: Tensor | None = None
) -> Tensor:
    """Replace float32 logits by weight · the gradient of the summed cross-entropy; returns the sum without `weight`.

    `weights_N` weighs positions; those with target −1 add nothing.
    """
    target_N = _gather_one(logits_NV, target_ids_N)
    peak_N = logits_NV.amax(-1)
    sum_N = logits_NV.sub_(peak_N[:, None]).exp_().sum(-1)
    weight_N = torch.ones_like(sum_N) if weights_N is None else weights_N
    weight_N = weight_N.masked_fill(target_ids_N == EMPTY_ID, 0.0)
    loss = (weight_N * (sum_N.log() + peak_N - target_N)).sum()
    logits_NV.mul_((weight * weight_N / sum_N)[:, None])
    logits_NV.scatter_add_(1, target_ids_N.clamp(min=0)[:, None], -weight * weight_N[:, None])
    return loss


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


def _scale_tail(exponentials_NV: Tensor, mass_N: Tensor, sum_N: Tensor) -> None:
    """Turn the tail's exponentials into mass · v."""
    exponentials_NV.mul_(torch.where(sum_N > 0, mass_N / sum_N, 0.0)[:, None])


def _sampled_tail(
    exponentials_NV: Tensor,
    own_N: Tensor,
    pull_N: Tensor,
    sum_N: Tensor,
    teacher: PreparedTargets,
    prior: TailPrior | None,
) -> Tensor:
    """Turn the tail's exponentials into own·v − pull·m, with m the tail samples, mixed with the prior's profile.

    Returns a correction [N, K] to add at the top-k ids, from which the profile is subtracted as well. Positions without
    tail samples use the bucket, and those whose top-k covers the profile use the samples alone.
    """
    sampled_N = torch.where(teacher.has_samples_N, pull_N, 0.0)
    _scale_tail(exponentials_NV, own_N - (pull_N - sampled_N), sum_N)
    topk_NK = torch.zeros_like(teacher.topk_ids_NK, dtype=torch.float32)
    if prior is not None:
        profile_NK = torch.where(teacher.topk_valid_NK, prior.profile_V[teacher.topk_ids_NK], 0.0)
        outside_N = prior.profile_V.sum() - profile_NK.sum(-1)
        mixed_N = torch.where(outside_N > _LEAST_MASS, prior.share * sampled_N, 0.0)
        sampled_N = sampled_N - mixed_N
        per_mass_N = torch.where(mixed_N > 0, mixed_N / outside_N, 0.0)
        exponentials_NV.addr_(per_mass_N, prior.profile_V, alpha=-1)
        topk_NK = per_mass_N[:, None] * profile_NK
    exponentials_NV.scatter_add_(1, teacher.tail_ids_NM, -sampled_N[:, None] * teacher.tail_weights_NM)
    return topk_NK


def _gather_one(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """The logit of one id per row; of id 0 where the id is −1."""
    return logits_NV.gather(1, ids_N.clamp(min=0)[:, None]).squeeze(1)
