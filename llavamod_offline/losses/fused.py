"""LM head and loss fused: computed from hidden states in chunks, so that the logits [N, V] are never stored in full.

Shape suffixes: N positions, D hidden size, V rows of the LM head, C positions of a chunk, S sequences.

The forward pass computes the gradients of hidden states and LM head as well, from each chunk's logits (see
`fused_linear.py`). Losses are sums over positions: divide by the number of positions of the optimiser step. Under
`torch.compile` these functions run outside the compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.chunk_gradients import zero_metrics
from llavamod_offline.losses.fused_linear import FusedLinearDivergence, TokenLogProbs
from llavamod_offline.losses.kinds import DivergenceKind, TailEstimator
from llavamod_offline.losses.rows.losses import CrossEntropy, Distillation, RowLoss
from llavamod_offline.losses.tail_estimators import TailPrior, checked_vocabulary, prepare_targets
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from llavamod_offline.models.lm_head import LmHead, as_lm_head

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _outside_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Break the graph of `torch.compile` here: when traced, a loss's metrics would not stay detached."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():  # torch's own decorator would always import the compiler
            return cast("Result", torch.compiler.disable(function)(*args, **kwargs))
        return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class LossTerms:
    """A loss summed over `count` positions, with its parts and metrics: detached sums over the same positions.

    `loss_sum` = kd_weight · `divergence_sum` + lm_weight · `cross_entropy_sum`; only `loss_sum` carries a gradient. A
    part of weight 0 is not computed and is 0. `metrics`: see `divergence.Divergence`; zeros without a divergence. If
    positions have weights, all sums are weighted.
    """

    loss_sum: Tensor
    divergence_sum: Tensor
    cross_entropy_sum: Tensor
    count: int
    metrics: dict[str, Tensor]


@_outside_graphs
def distillation_from_hidden(
    hidden_ND: Tensor,
    lm_head: LmHead | Tensor,
    targets: SparseTargets,
    *,
    divergence: DivergenceKind = "forward_kl",
    js_weight: float = 0.5,
    skew: float = 0.1,
    tail: TailEstimator = "bucket",
    prior: TailPrior | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    weights_N: Tensor | None = None,
    chunk_size: int | None = None,
) -> LossTerms:
    """kd_weight · T² · divergence(teacher, student) + lm_weight · cross-entropy with the actual tokens, summed.

    Shapes: `hidden_ND` [N, D] are the hidden states that predict the N positions of `targets`, on the same device;
    `lm_head` is a model's (`lm_head_of`), or the weight [V, D] of one without bias, scale and softcap; `weights_N` [N]
    ≥ 0 weighs positions. `divergence` with its `js_weight` or `skew`: see `bucketed_divergence.py`; `tail`, and `prior`
    for `samples`: see `tail_estimators.py`. Rows of the LM head from `targets.vocab_size` on get no probability and no
    gradient. Positions with neither top-k nor tail add nothing, nor do targets of −1 to the cross-entropy; N = 0 gives
    0 with zero gradients. `chunk_size`: how many positions' logits are held at once.
    Errors: `TargetError` if the number of positions differs, or as `prepare_targets`.
    """
    if len(hidden_ND) != len(targets):
        raise TargetError(f"{len(hidden_ND)} hidden states for {len(targets)} cached positions: pass one for each")
    head = as_lm_head(lm_head)
    vocab = checked_vocabulary(targets, head.rows)
    zero = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    target_ids_N = targets.target_ids_N.long()
    weights_N = None if weights_N is None else weights_N.float()
    if not kd_weight:
        plain = CrossEntropy(target_ids_N, weights_N, lm_weight, zero)
        loss_sum = fused_rows(hidden_ND, head, vocab, chunk_size, plain)
        return LossTerms(loss_sum, zero, plain.loss_sum, len(targets), zero_metrics(hidden_ND.device))
    spec = DivergenceSpec(divergence, js_weight, skew)
    teacher = prepare_targets(targets, vocab, spec=spec, tail=tail, temperature=temperature)
    prior = None if prior is None else prior.on(hidden_ND.device, vocab)
    loss = Distillation(teacher, target_ids_N, weights_N, prior, kd_weight, lm_weight, zero, zero)
    loss_sum = fused_rows(hidden_ND, head, vocab, chunk_size, loss)
    return LossTerms(loss_sum, loss.divergence_sum, loss.cross_entropy_sum, len(targets), loss.metrics)


@_outside_graphs
def cross_entropy_from_hidden(
    hidden_ND: Tensor,
    lm_head: LmHead | Tensor,
    target_ids_N: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> LossTerms:
    """Cross-entropy with the target ids, summed over positions.

    Shapes: as `distillation_from_hidden`; `target_ids_N` [N] int, −1 adds nothing. Ids from `vocab_size` on get no
    probability.
    Errors: `TargetError` if a target id is outside the vocabulary.
    """
    target_ids_N = target_ids_N.long()
    head = as_lm_head(lm_head)
    vocab = _vocabulary(head, target_ids_N, vocab_size)

    zero = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    loss_sum = fused_rows(hidden_ND, head, vocab, chunk_size, CrossEntropy(target_ids_N, None, 1.0, zero))
    return LossTerms(loss_sum, zero, loss_sum.detach(), len(target_ids_N), zero_metrics(hidden_ND.device))


@_outside_graphs
def sequence_log_probs_from_hidden(
    hidden_ND: Tensor,
    lm_head: LmHead | Tensor,
    target_ids_N: Tensor,
    sequence_of_N: Tensor,
    n_sequences: int,
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probs of the target ids summed over each sequence's positions, [S] float32, differentiable.

    Shapes: as `cross_entropy_from_hidden`; `sequence_of_N` [N] int64 is the sequence of each position. Divide by the
    sequences' lengths for means.
    Errors: `TargetError` if a target id is outside the vocabulary.
    """
    target_ids_N = target_ids_N.long()
    head = as_lm_head(lm_head)
    vocab = _vocabulary(head, target_ids_N, vocab_size)
    log_probs_N = cast(
        "Tensor",
        TokenLogProbs.apply(hidden_ND, head.weight_VD, head.bias_V, head, target_ids_N, vocab, chunk_size),  # type: ignore[no-untyped-call]
    )
    return log_probs_N.new_zeros(n_sequences).index_add(0, sequence_of_N, log_probs_N)


def _vocabulary(lm_head: LmHead, target_ids_N: Tensor, vocab_size: int | None) -> int:
    vocab = min(vocab_size or lm_head.rows, lm_head.rows)
    largest = int(target_ids_N.max()) if target_ids_N.numel() else EMPTY_ID
    if largest >= vocab:
        raise TargetError(
            f"target id {largest} lies beyond the student's vocabulary of {vocab} ids: use the student's own tokenizer"
        )
    return vocab


def fused_rows(hidden_ND: Tensor, head: LmHead, vocab: int, chunk_size: int | None, loss: RowLoss) -> Tensor:
    """The summed loss of the rows of logits, with gradients for hidden states and LM head."""
    # needs_input_grad is True even under no_grad, where gradients must not be computed.
    train = torch.is_grad_enabled()
    applied = FusedLinearDivergence.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head.weight_VD, head.bias_V, head, vocab, chunk_size, loss, train
    )
    return cast("Tensor", applied)
