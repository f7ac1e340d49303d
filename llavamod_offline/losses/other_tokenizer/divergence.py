"""Distillation from a teacher with another tokenizer, over the spans of tokens that both share.

A span's last token has a distribution, which the probability of its earlier tokens multiplies (chain rule): P(v) =
p(earlier tokens) · p(v | earlier tokens) for the teacher, and Q likewise for the student. A span adds two terms:

- the divergence of P and Q over the matched tokens, which stand for the same bytes in both, and one bucket for all
  else, including whatever departs from the span's earlier tokens. It is a true divergence, and a lower bound, as with
  one tokenizer (see `bucketed_divergence.py`).
- `unmatched_weight` times the distance between the other probabilities, sorted: Σ |P − Q| over the teacher's unmatched
  top-k, most likely first, and equally many of the student's most likely unmatched ids; plus the excess of the
  student's further unmatched ids over the teacher's tail, which is the least distance that the teacher's unknown ones
  can leave. The student's unmatched ids are those without any counterpart; in spans of several tokens, all that are not
  matched.

Sources: GOLD (TRL's `ULDLoss` with `bayesian` merging), whose term for matched tokens has no bucket, and which also
matches ids in spans of several tokens, where they stand for different bytes; ULD, arXiv 2402.12030, for the sorted
distance.

Shape suffixes: N positions of the student, S spans, C of a chunk, K matched slots, E = K + 1 events, U unmatched slots,
V ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec, event_divergence
from llavamod_offline.losses.fused import (
    LossTerms,
    cross_entropy_from_hidden,
    fused_rows,
    sequence_log_probs_from_hidden,
)
from llavamod_offline.losses.kinds import DivergenceKind
from llavamod_offline.losses.other_tokenizer.targets import AlignedTargets
from llavamod_offline.models.lm_head import LmHead, as_lm_head

METRICS = ("divergence", "unmatched", "kl", "teacher_unmatched", "spans")
_LEAST = 1e-30  # the smallest student probability whose logarithm is taken
_ROUNDING = 1e-7  # of sums of probabilities: a teacher that has no other tokens need not give them probability 0
_CHUNK_LOGITS = 2**24


def aligned_distillation_from_hidden(
    hidden_ND: Tensor,
    lm_head: LmHead | Tensor,
    target_ids_N: Tensor,
    targets: AlignedTargets,
    *,
    has_counterpart_V: Tensor,
    divergence: DivergenceKind = "forward_kl",
    js_weight: float = 0.5,
    skew: float = 0.1,
    kd_weight: float = 1.0,
    unmatched_weight: float = 1.0,
    lm_weight: float = 0.0,
    chunk_size: int | None = None,
) -> LossTerms:
    """kd_weight · (divergence + unmatched_weight · sorted distance) + lm_weight · cross-entropy, summed.

    The first is summed over spans, the second over positions. Shapes: `hidden_ND` [N, D] predict the student's tokens
    `target_ids_N`; `has_counterpart_V` [V] bool, whose length is the number of ids that get a probability.
    `divergence_sum` excludes the sorted distance, which is the metric `unmatched`; `spans` counts spans, `kl` is the
    forward KL over the events, `teacher_unmatched` the teacher's mass on the unmatched tokens of its top-k.
    """
    head = as_lm_head(lm_head)
    vocab = min(len(has_counterpart_V), head.rows)
    paths_S = torch.zeros(len(targets), device=hidden_ND.device)
    if len(targets.rows_P):
        rows_P = targets.rows_P
        paths_S = sequence_log_probs_from_hidden(
            hidden_ND.index_select(0, rows_P),
            head,
            target_ids_N[rows_P],
            targets.spans_P,
            len(targets),
            vocab_size=vocab,
            chunk_size=chunk_size,
        )
    spec = DivergenceSpec(divergence, js_weight, skew)
    loss = _SpanLoss(targets, paths_S.detach(), has_counterpart_V[:vocab], spec, unmatched_weight)
    size = chunk_size or max(1, min(256, _CHUNK_LOGITS // vocab))
    distance = fused_rows(hidden_ND.index_select(0, targets.rows_S), head, vocab, size, loss)
    # The paths add their gradient but no value.
    loss_sum = kd_weight * (distance + (loss.path_slopes_S * (paths_S - paths_S.detach())).sum())
    sums = dict(loss.sums)
    cross_entropy = torch.zeros_like(sums["divergence"])
    if lm_weight:
        terms = cross_entropy_from_hidden(hidden_ND, head, target_ids_N, vocab_size=vocab, chunk_size=chunk_size)
        loss_sum, cross_entropy = loss_sum + lm_weight * terms.loss_sum, terms.cross_entropy_sum
    return LossTerms(loss_sum, sums.pop("divergence"), cross_entropy, len(targets), sums)


def span_distances(
    logits_SV: Tensor,
    paths_S: Tensor,
    targets: AlignedTargets,
    *,
    has_counterpart_V: Tensor,
    spec: DivergenceSpec,
) -> dict[str, Tensor]:
    """What the loss needs from each span, [S], from the logits of its last token and the log-prob of its earlier ones.

    `divergence` and `unmatched` carry gradients; `aligned_distillation_from_hidden` explains all.
    """
    log_q_SV = logits_SV.log_softmax(-1)
    path_S = paths_S.exp()
    is_matched_SK = targets.topk_ids_SK >= 0
    log_p_SE, log_q_SE = _events(log_q_SV, paths_S, path_S, targets, is_matched_SK)
    value_S, slope_SE = event_divergence(log_p_SE, log_q_SE.detach(), spec)
    linear_SE = torch.where(torch.isfinite(log_q_SE), log_q_SE, 0.0)
    gradient_S = (slope_SE * (linear_SE - linear_SE.detach())).sum(-1)
    p_SU = targets.unmatched_log_probs_SU.exp()
    return {
        "divergence": value_S + gradient_S,
        "unmatched": _sorted_distance(log_q_SV, path_S, targets, p_SU, is_matched_SK, has_counterpart_V),
        "kl": event_divergence(log_p_SE, log_q_SE.detach(), DivergenceSpec())[0],
        "teacher_unmatched": p_SU.sum(-1),
        "spans": torch.ones_like(value_S),
    }


def _events(
    log_q_SV: Tensor, paths_S: Tensor, path_S: Tensor, targets: AlignedTargets, is_matched_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs of the matched tokens and of all else, [S, E], of teacher and student."""
    never_SK = torch.zeros_like(targets.topk_log_probs_SK).masked_fill(is_matched_SK, -torch.inf)
    ids_SK = targets.topk_ids_SK.clamp(min=0)
    others_S = log_q_SV.scatter_add(1, ids_SK, never_SK).exp().sum(-1)
    rest_S = path_S * others_S - paths_S.expm1()
    own_SK = (log_q_SV.gather(1, ids_SK) + paths_S[:, None]).masked_fill(~is_matched_SK, -torch.inf)
    their_rest_S = (
        targets.unmatched_log_probs_SU.exp().sum(-1) + targets.tail_log_mass_S.exp() - targets.path_log_probs_S.expm1()
    )
    log_p_SE = torch.cat([targets.topk_log_probs_SK, their_rest_S.clamp(min=_ROUNDING).log()[:, None]], 1)
    return log_p_SE, torch.cat([own_SK, rest_S.clamp(min=_LEAST).log()[:, None]], 1)


def _sorted_distance(
    log_q_SV: Tensor,
    path_S: Tensor,
    targets: AlignedTargets,
    p_SU: Tensor,
    is_matched_SK: Tensor,
    has_counterpart_V: Tensor,
) -> Tensor:
    """The distance between the sorted probabilities of unmatched tokens, [S]."""
    never_SK = torch.zeros_like(targets.topk_log_probs_SK).masked_fill(is_matched_SK, -torch.inf)
    unmatched_SV = log_q_SV.masked_fill(targets.is_single_S[:, None] & has_counterpart_V, -torch.inf)
    unmatched_SV = unmatched_SV.scatter_add(1, targets.topk_ids_SK.clamp(min=0), never_SK).exp()
    q_SU = unmatched_SV.topk(min(p_SU.shape[1], unmatched_SV.shape[1]), -1).values * path_S[:, None]
    q_SU = torch.nn.functional.pad(q_SU, (0, p_SU.shape[1] - q_SU.shape[1])) * (p_SU > 0)
    further_S = unmatched_SV.sum(-1) * path_S - q_SU.sum(-1)
    return (p_SU - q_SU).abs().sum(-1) + (further_S - targets.tail_log_mass_S.exp()).clamp(min=0)


@dataclass(eq=False)
class _SpanLoss:
    """The row loss of spans in their last tokens' logits; `path_slopes_S`: its slopes in the others' log-probs."""

    targets: AlignedTargets
    paths_S: Tensor
    has_counterpart_V: Tensor
    spec: DivergenceSpec
    unmatched_weight: float
    path_slopes_S: Tensor = field(init=False)
    sums: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.path_slopes_S = torch.zeros_like(self.paths_S)
        self.sums = {name: self.paths_S.new_zeros(()) for name in METRICS}

    def in_place(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        with torch.enable_grad():
            leaf_CV, paths_C = logits_CV.detach().requires_grad_(), self.paths_S[rows].detach().requires_grad_()
            found = span_distances(
                leaf_CV, paths_C, self.targets[rows], has_counterpart_V=self.has_counterpart_V, spec=self.spec
            )
            loss = (found["divergence"] + self.unmatched_weight * found["unmatched"]).sum()
            gradient_CV, slopes_C = torch.autograd.grad(loss, (leaf_CV, paths_C))
        for name, value_C in found.items():
            self.sums[name] = self.sums[name] + value_C.detach().sum()
        self.path_slopes_S[rows] = slopes_C
        logits_CV.copy_(gradient_CV)
        return loss.detach()
