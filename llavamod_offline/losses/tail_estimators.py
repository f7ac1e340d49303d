"""The cached teacher as a divergence wants it: at one temperature, in one reading of the tail, as a few events.

Shape suffixes: N positions, K slots of the head, M of tail draws, E = K + 1 events: the head's ids, then the tail as a
bucket.

The readings of the tail differ in the target p̂, whose gradient in the logits is q − p̂ under the forward KL. With the
teacher p, the tail's mass r and the student q:

- `bucket`: the tail is one event. p̂ spreads r by the student's own tail shape. A lower bound of the full divergence.
- `draws`: p̂ puts r on the ids drawn from the tail, by their weights: unbiased in value and gradient. A position with a
  tail but no draw is read as a bucket. Source: random-sampling distillation, arXiv 2503.16870.
- `shrink`: p̂ spreads r over a mixture of the student's own tail shape, the teacher's mean tail and the draws, by
  weights learnt while training (see `shrinkage.py`). The loss's value is the bucket's. The bucket where T ≠ 1.
- `renormalised`: the tail is forgotten and the head scaled up to 1. Biased; the baseline that others use.

A temperature T raises the teacher's probabilities to 1/T; the stored normaliser makes that exact in the head and in the
mass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.kinds import TAIL_ESTIMATORS, TailEstimator
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets

NEVER = float("-inf")


@dataclass(frozen=True)
class PreparedTargets:
    """The teacher at one temperature; empty slots hold id 0, log-prob −inf and weight 0.

    `log_probs_NE` is what the loss imitates and sums to 1 in each row; `full_log_probs_NE` what the metrics compare
    with: the same, but for `renormalised`, which forgets the tail. `has_target_N` is False for a row with neither head
    nor tail, which adds nothing to anything; `has_samples_N` says which rows have a tail and draws from it.
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


def checked_vocabulary(targets: SparseTargets, head_rows: int) -> int:
    """The number of ids the divergence ranges over. Errors: `TargetError` if a target's id is beyond the head."""
    if targets.vocab_size <= head_rows:
        return targets.vocab_size
    ids = (targets.topk_ids_NK, targets.tail_ids_NM, targets.target_ids_N)
    largest = max((int(tensor.max()) for tensor in ids if tensor.numel()), default=EMPTY_ID)
    if largest >= head_rows:
        raise TargetError(
            f"target id {largest} lies beyond the student's head of {head_rows} rows (the cache has a vocabulary of "
            f"{targets.vocab_size}): use a student with the teacher's vocabulary, or capture with a smaller one"
        )
    return head_rows


def prepare_targets(
    targets: SparseTargets,
    vocab: int,
    *,
    spec: DivergenceSpec,
    tail: TailEstimator = "bucket",
    temperature: float = 1.0,
) -> PreparedTargets:
    """Bring the records to a temperature and a reading of the tail, for one divergence over `vocab` ids.

    Errors: `TargetError` if `tail` is unknown or not `bucket` where the divergence is defined on head and bucket alone;
    `temperature` has no stored normaliser; the records have a tail but no draws that `draws` could use at that
    temperature; or a reverse KL would be infinite, since the teacher gives ids no probability that the student can.
    """
    if tail not in TAIL_ESTIMATORS:
        raise TargetError(f"tail reading '{tail}' is unknown: choose one of {', '.join(TAIL_ESTIMATORS)}")
    if tail != "bucket" and spec.kind != "forward_kl":
        raise TargetError(
            f"tail '{tail}': {spec.kind} is defined on head and bucket: set tail to 'bucket', or use forward_kl"
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
    # A head that holds the whole vocabulary leaves no tail, whatever rounding says.
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
        tail="bucket" if tail == "shrink" and temperature != 1.0 else tail,
        spec=spec,
    )


def _tail_at(tail_N: Tensor, ids_N: Tensor, topk_NK: Tensor, normaliser_N: Tensor, temperature: float) -> Tensor:
    """The tail's log mass at T: what the head at T leaves, within what a tail of that mass over so many ids allows.

    The difference is rounded where little is left. Σ p^(1/T) over a tail of n ids and mass r lies between r^(1/T), all
    of it on one id, and n^(1 − 1/T) · r^(1/T), spread evenly.
    """
    one_id_N = tail_N / temperature - normaliser_N
    evenly_N = one_id_N + (1 - 1 / temperature) * ids_N.double().log()
    left_N = (1.0 - topk_NK.exp().sum(-1)).clamp(min=0.0).log()
    left_N = left_N.clamp(torch.minimum(one_id_N, evenly_N), torch.maximum(one_id_N, evenly_N))
    return torch.where(torch.isneginf(tail_N), tail_N, left_N)


def _normalised(log_probs_NE: Tensor) -> Tensor:
    """Scale rows to a sum of 1: stored log-probs are rounded, and a divergence of targets must not be negative."""
    total_N1 = log_probs_NE.logsumexp(-1, keepdim=True)
    return log_probs_NE - total_N1.masked_fill(torch.isneginf(total_N1), 0.0)


def _without_tail(log_probs_NE: Tensor) -> Tensor:
    """Forget the bucket, and scale the head up to 1."""
    return _normalised(torch.cat([log_probs_NE[:, :-1], torch.full_like(log_probs_NE[:, -1:], NEVER)], 1))


def _check_support(log_probs_NE: Tensor, valid_NK: Tensor, tail_unreachable_N: Tensor) -> None:
    """Refuse positions where the teacher gives no probability to an event that the student can reach."""
    reachable_NE = torch.cat([valid_NK, ~tail_unreachable_N[:, None]], 1)
    infinite_N = (torch.isneginf(log_probs_NE) & reachable_NE).any(-1)
    if bool(infinite_N.any()):
        raise TargetError(
            f"reverse_kl is infinite at {int(infinite_N.sum())} position(s), whose records give some ids no "
            "probability at all: use skewed_reverse_kl or js"
        )


def _usable_tail_samples(
    targets: SparseTargets, tail_N: Tensor, tail: TailEstimator, temperature: float
) -> tuple[Tensor, Tensor]:
    """The draws as ids ≥ 0 and float32 weights, or none at a temperature they were not drawn at."""
    ids_NM = targets.tail_ids_NM
    if tail == "samples" and bool(torch.isfinite(tail_N).any()):
        if temperature != 1.0:
            raise TargetError(
                f"tail 'samples' at temperature {temperature:g}: tail samples were drawn at temperature 1: "
                "set tail to 'bucket', or temperature to 1"
            )
        if ids_NM.shape[1] == 0:
            raise TargetError(
                "tail 'samples': the cache holds no tail samples: set tail to 'bucket', or capture it again with "
                "capture.tail_samples_max above 0"
            )
    if temperature != 1.0:
        ids_NM = ids_NM[:, :0]
    weights_NM = targets.tail_weights_NM[:, : ids_NM.shape[1]].float()
    return ids_NM.long().clamp(min=0), weights_NM
