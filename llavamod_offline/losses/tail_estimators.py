"""Prepare cached targets for a divergence: one temperature, one estimator of the tail, a few events per position.

Shape suffixes: N positions, K top-k slots, M tail sample slots, E = K + 1 events: the top-k ids, then a bucket for the
tail.

The estimators differ in the target p̂; the gradient of the forward KL with respect to the logits is q − p̂. With the
teacher p, the tail's mass r and the student q:

- `samples`: p̂ puts r on the tail samples, by their weights: unbiased in value and gradient at the temperature they
  were taken at. Positions with a tail but without samples use the bucket. Source: random-sampling distillation, arXiv
  2503.16870. With a `TailPrior`, for records read many times, a share of r follows the teacher's mean tail instead.
- `bucket`: the tail is one event, and p̂ spreads r by the student's own tail shape. A lower bound of the full
  divergence.
- `renormalised`: drops the tail and scales the top-k up to 1. Biased; the baseline of other systems.

A temperature T raises the teacher's probabilities to 1/T; with the stored normaliser this is exact for the top-k and
for the tail's mass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.kinds import TAIL_ESTIMATORS, DivergenceKind, TailEstimator
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from llavamod_offline.plural import counted

NEVER = float("-inf")
LEAST_SHARE = 0.02  # of a prior; one below it is not worth its pass over the vocabulary


@dataclass(frozen=True)
class TailPrior:
    """The teacher's mean tail, `profile_V` [V] ≥ 0, in place of a `share` of the samples.

    Students that read few records many times memorise their samples: this noise is the same in every pass and does not
    average out. The mean tail has less of it, at the cost of a bias.
    """

    share: float
    profile_V: Tensor

    def on(self, device: torch.device, vocab: int) -> TailPrior:
        """The prior on a device. Errors: `TargetError` if it was made for another number of ids."""
        if len(self.profile_V) != vocab:
            raise TargetError(f"tail prior: made for {len(self.profile_V)} ids, the divergence has {vocab}")
        return self if self.profile_V.device == device else replace(self, profile_V=self.profile_V.to(device))


@dataclass(frozen=True)
class PreparedTargets:
    """The teacher at one temperature; empty slots hold id 0, log-prob −inf and weight 0.

    `log_probs_NE` is the target of the loss, each row summing to 1; `full_log_probs_NE` is the target of the metrics,
    which keeps the tail even for `renormalised`. `has_target_N` is False for rows with neither top-k nor tail, which
    add nothing; `has_samples_N` is True for rows with tail samples.
    """

    topk_ids_NK: Tensor
    topk_valid_NK: Tensor
    log_probs_NE: Tensor
    full_log_probs_NE: Tensor
    tail_ids_NM: Tensor
    tail_weights_NM: Tensor
    entropy_N: Tensor
    has_target_N: Tensor
    has_samples_N: Tensor
    temperature: float
    tail: TailEstimator
    spec: DivergenceSpec

    def __getitem__(self, rows: slice) -> PreparedTargets:
        """A slice of the positions."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        sliced: dict[str, Any] = {name: value[rows] for name, value in values if isinstance(value, Tensor)}
        return replace(self, **sliced)


def choose_tail(
    divergence: DivergenceKind, temperature: float, *, sampled_at: float, has_samples: bool
) -> TailEstimator:
    """The default estimator: `samples` for the forward KL, `bucket` for other divergences, or without samples.

    `sampled_at`: the temperature that the cache was captured for. Errors: `TargetError` if it is not `temperature`.
    """
    if divergence != "forward_kl" or not has_samples:
        return "bucket"
    if temperature != sampled_at:
        raise TargetError(
            f"loss.temperature is {temperature:g}, but the cache was captured for {sampled_at:g}, so its tail samples "
            f"cannot be used: capture again with capture.temperature={temperature:g}, or set loss.tail to bucket"
        )
    return "samples"


def prior_share(*, positions: int, epochs: float) -> float:
    """The share of a `TailPrior` for `positions` records that are read `epochs` times each; 0: the samples alone.

    It grows with the number of times that a record is read, and falls with the number of records, whose noise averages
    out over what they teach together: k/(1 + k) with k = 2.8 · √((epochs − 1)/positions). A fit to the shares that were
    best for students of 128 to 8,192 records read 5 to 300 times (the low-rank teacher of
    `tests/benchmarks/readings.py`): .8 for 128 records read 300 times, .35 for 1,024 and 37, .05 for 8,192 and 5; 0 for
    a million records and ten epochs.
    """
    odds = 2.8 * (max(epochs - 1.0, 0.0) / max(positions, 1)) ** 0.5
    share = odds / (1 + odds)
    return share if share >= LEAST_SHARE else 0.0


def checked_vocabulary(targets: SparseTargets, lm_head_rows: int) -> int:
    """The number of ids the divergence covers. Errors: `TargetError` if the LM head has no row for a target's id."""
    if targets.vocab_size <= lm_head_rows:
        return targets.vocab_size
    ids = (targets.topk_ids_NK, targets.tail_ids_NM, targets.target_ids_N)
    largest = max((int(tensor.max()) for tensor in ids if tensor.numel()), default=EMPTY_ID)
    if largest >= lm_head_rows:
        raise TargetError(
            f"target id {largest} lies beyond the {lm_head_rows} rows of the student's LM head (the cache's vocabulary "
            f"has {targets.vocab_size} ids): use a student with the teacher's vocabulary, or leave "
            f"those ids out by targets.limited({lm_head_rows})"
        )
    return lm_head_rows


def prepare_targets(
    targets: SparseTargets,
    vocab: int,
    *,
    spec: DivergenceSpec,
    tail: TailEstimator = "bucket",
    temperature: float = 1.0,
) -> PreparedTargets:
    """Prepare records for the divergence `spec` over `vocab` ids, at a temperature and with a tail estimator.

    Errors: `TargetError` if `tail` is unknown, or not `bucket` for a divergence other than `forward_kl`; if
    `temperature` has no stored normaliser; if `samples` finds no tail samples for that temperature; or if a reverse KL
    is infinite because a record assigns some ids no probability.
    """
    if tail not in TAIL_ESTIMATORS:
        raise TargetError(f"tail estimator '{tail}' is unknown: choose one of {', '.join(TAIL_ESTIMATORS)}")
    if tail != "bucket" and spec.kind != "forward_kl":
        raise TargetError(
            f"tail '{tail}': {spec.kind} supports only 'bucket': set tail to 'bucket', or divergence to forward_kl"
        )
    if not temperature > 0:
        raise TargetError(f"temperature {temperature:g}: expected a number above 0")
    valid_NK = targets.topk_ids_NK != EMPTY_ID
    normaliser_N = targets.log_normaliser_N(temperature).double()
    topk_NK = targets.topk_log_probs_NK.double() / temperature - normaliser_N[:, None]
    topk_NK = topk_NK.masked_fill(~valid_NK, NEVER)
    tail_N = targets.tail_log_mass_N.double()
    if temperature != 1.0:
        tail_ids_N = (targets.vocab_size - valid_NK.sum(-1)).clamp(min=1)
        tail_N = _tail_at(tail_N, tail_ids_N, topk_NK, normaliser_N, temperature)
    # A top-k of the whole vocabulary leaves no tail, even if rounding says otherwise.
    whole_N = valid_NK.sum(-1) >= vocab
    full_NE = _normalised(torch.cat([topk_NK, tail_N.masked_fill(whole_N, NEVER)[:, None]], 1))
    log_probs_NE = full_NE if tail != "renormalised" else _without_tail(full_NE)
    has_target_N = torch.isfinite(log_probs_NE).any(-1)
    if spec.kind == "reverse_kl":
        _check_support(log_probs_NE, valid_NK, whole_N | ~has_target_N)
    tail_ids_NM, tail_weights_NM = _usable_tail_samples(targets, full_NE[:, -1], tail, temperature)
    return PreparedTargets(
        topk_ids_NK=targets.topk_ids_NK.long().clamp(min=0),
        topk_valid_NK=valid_NK,
        log_probs_NE=log_probs_NE.float(),
        full_log_probs_NE=full_NE.float(),
        tail_ids_NM=tail_ids_NM,
        tail_weights_NM=tail_weights_NM,
        entropy_N=targets.entropy_N,
        has_target_N=has_target_N,
        has_samples_N=(tail_weights_NM.sum(-1) > 0) & torch.isfinite(full_NE[:, -1]),
        temperature=temperature,
        tail=tail,
        spec=spec,
    )


def _tail_at(tail_N: Tensor, ids_N: Tensor, topk_NK: Tensor, normaliser_N: Tensor, temperature: float) -> Tensor:
    """The tail's log mass at T: 1 − the top-k's mass at T, clamped to what a tail of this mass and size can have.

    The clamp is for small tails, where rounding dominates the difference: Σ p^(1/T) over n ids of mass r lies between
    r^(1/T) (all on one id) and n^(1 − 1/T) · r^(1/T) (spread evenly).
    """
    one_id_N = tail_N / temperature - normaliser_N
    evenly_N = one_id_N + (1 - 1 / temperature) * ids_N.double().log()
    left_N = (1.0 - topk_NK.exp().sum(-1)).clamp(min=0.0).log()
    left_N = left_N.clamp(torch.minimum(one_id_N, evenly_N), torch.maximum(one_id_N, evenly_N))
    return torch.where(torch.isneginf(tail_N), tail_N, left_N)


def _normalised(log_probs_NE: Tensor) -> Tensor:
    """Scale rows to a sum of 1: stored log-probs are rounded, and divergences must not become negative."""
    total_N1 = log_probs_NE.logsumexp(-1, keepdim=True)
    return log_probs_NE - total_N1.masked_fill(torch.isneginf(total_N1), 0.0)


def _without_tail(log_probs_NE: Tensor) -> Tensor:
    """Drop the bucket and scale the top-k up to 1."""
    return _normalised(torch.cat([log_probs_NE[:, :-1], torch.full_like(log_probs_NE[:, -1:], NEVER)], 1))


def _check_support(log_probs_NE: Tensor, valid_NK: Tensor, tail_unreachable_N: Tensor) -> None:
    """Reject positions where the teacher gives an event probability 0 and the student may not."""
    reachable_NE = torch.cat([valid_NK, ~tail_unreachable_N[:, None]], 1)
    infinite_N = (torch.isneginf(log_probs_NE) & reachable_NE).any(-1)
    if bool(infinite_N.any()):
        raise TargetError(
            f"reverse_kl is infinite at {counted(int(infinite_N.sum()), 'position')} whose records assign some ids no "
            "probability: use skewed_reverse_kl or js"
        )


def _usable_tail_samples(
    targets: SparseTargets, tail_N: Tensor, tail: TailEstimator, temperature: float
) -> tuple[Tensor, Tensor]:
    """The tail samples as ids ≥ 0 and float32 weights; none if they were taken at another temperature."""
    ids_NM = targets.tail_ids_NM
    usable = temperature == targets.sampled_at and ids_NM.shape[1] > 0
    if tail == "samples" and not usable and bool(torch.isfinite(tail_N).any()):  # waits for the device only if unusable
        if temperature != targets.sampled_at:
            raise TargetError(
                f"tail 'samples' at temperature {temperature:g}: the cache was captured for {targets.sampled_at:g}: "
                f"capture it again with capture.temperature={temperature:g}, or set tail to 'bucket'"
            )
        if ids_NM.shape[1] == 0:
            raise TargetError(
                "tail 'samples': the cache holds no tail samples: set tail to 'bucket', or capture it again with "
                "capture.tail_samples_max above 0"
            )
    if temperature != targets.sampled_at:
        ids_NM = ids_NM[:, :0]
    weights_NM = targets.tail_weights_NM[:, : ids_NM.shape[1]].float()
    return ids_NM.long().clamp(min=0), weights_NM
