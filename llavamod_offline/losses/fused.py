"""Head and loss in one: from hidden states and the head's weight, in chunks, so that logits [N, V] never exist whole.

Letters: N positions, D hidden size, V rows of the head, C positions of a chunk, S sequences.

The gradients with respect to hidden states and head are computed in the forward pass, chunk by chunk, while the chunk's
logits are at hand: three matrix products a chunk, where checkpointing would take four. Products run in the weight's
dtype; logits, softmax and sums over chunks are float32. Losses are sums over positions; divide by the number of
positions of the optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.divergence import (
    Tail,
    checked_vocabulary,
    cross_entropy_in_place,
    divergence_in_place,
    no_metrics,
    teacher_at,
)
from llavamod_offline.losses.targets import SparseTargets

CHUNK_SIZE = 256

# Takes a chunk's float32 logits [C, V] and its rows, returns the summed loss, leaves the gradient in the logits' place.
ChunkLoss = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class LossTerms:
    """A loss summed over `count` positions, with its parts and metrics as detached sums over the same positions.

    `loss_sum` = kd_weight · `divergence_sum` + lm_weight · `cross_entropy_sum`; only it carries a gradient. A part of
    weight 0 is not computed and is 0. `metrics`: see `divergence.Divergence`; zeros if there is no divergence.
    """

    loss_sum: Tensor
    divergence_sum: Tensor
    cross_entropy_sum: Tensor
    count: int
    metrics: dict[str, Tensor]


def distillation_from_hidden(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    targets: SparseTargets,
    *,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> LossTerms:
    """kd_weight · T² · forward KL(teacher ‖ student) + lm_weight · cross-entropy with the actual tokens, summed.

    Shapes: `hidden_ND` [N, D] are the hidden states that predict the N positions of `targets`, on the same device.
    Rows of the head from `targets.vocab_size` on get no probability and no gradient. N = 0 gives 0 with zero gradients.
    Errors: `TargetError` as `forward_kl`, or if N differs.
    """
    if len(hidden_ND) != len(targets):
        raise TargetError(f"{len(hidden_ND)} hidden states for {len(targets)} cached positions: they must be the same")
    vocab = checked_vocabulary(targets, head_weight_VD.shape[0])
    zero = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    metrics = no_metrics(hidden_ND.device)
    parts = {"divergence": zero, "cross_entropy": zero}
    teacher = teacher_at(targets, vocab, tail=tail, temperature=temperature) if kd_weight else None

    def chunk_loss(logits_CV: Tensor, rows: slice) -> Tensor:
        target_ids_C = targets.target_ids_N[rows]
        divergence = zero
        if teacher is None:
            cross_entropy = cross_entropy_in_place(logits_CV, target_ids_C, weight=lm_weight)
        else:
            divergence, cross_entropy = divergence_in_place(
                logits_CV,
                teacher[rows],
                metrics,
                kd_weight=kd_weight,
                lm_weight=lm_weight,
                target_ids_N=target_ids_C,
            )
        parts["divergence"] = parts["divergence"] + divergence
        parts["cross_entropy"] = parts["cross_entropy"] + cross_entropy
        return kd_weight * divergence + lm_weight * cross_entropy

    loss_sum = _fused(hidden_ND, head_weight_VD, vocab, chunk_size, chunk_loss)
    return LossTerms(loss_sum, parts["divergence"], parts["cross_entropy"], len(targets), metrics)


def cross_entropy_from_hidden(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    target_ids_N: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> LossTerms:
    """Cross-entropy with the target ids, summed over positions; ids from `vocab_size` on get no probability.

    Errors: `TargetError` if an id is beyond the vocabulary.
    """
    vocab = _vocabulary(head_weight_VD, target_ids_N, vocab_size)

    def chunk_loss(logits_CV: Tensor, rows: slice) -> Tensor:
        return cross_entropy_in_place(logits_CV, target_ids_N[rows])

    loss_sum = _fused(hidden_ND, head_weight_VD, vocab, chunk_size, chunk_loss)
    zero = torch.zeros_like(loss_sum.detach())
    return LossTerms(loss_sum, zero, loss_sum.detach(), len(target_ids_N), no_metrics(hidden_ND.device))


def sequence_log_probs_from_hidden(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    target_ids_N: Tensor,
    sequence_of_N: Tensor,
    n_sequences: int,
    *,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Log-probs of the target ids summed over each sequence's positions, [S], float32 and differentiable.

    `sequence_of_N` says which sequence a position belongs to. Divide by the counts for means.
    Errors: `TargetError` if an id is beyond the vocabulary.
    """
    vocab = _vocabulary(head_weight_VD, target_ids_N, vocab_size)
    log_probs_N = cast(
        "Tensor",
        _TokenLogProbs.apply(hidden_ND, head_weight_VD, target_ids_N, vocab, chunk_size),  # type: ignore[no-untyped-call]
    )
    return log_probs_N.new_zeros(n_sequences).index_add(0, sequence_of_N, log_probs_N)


def _vocabulary(head_weight_VD: Tensor, target_ids_N: Tensor, vocab_size: int | None) -> int:
    vocab = min(vocab_size or head_weight_VD.shape[0], head_weight_VD.shape[0])
    if target_ids_N.numel() and int(target_ids_N.max()) >= vocab:
        raise TargetError(
            f"target id {int(target_ids_N.max())} lies beyond the student's vocabulary of {vocab} ids: "
            "use the tokenizer that belongs to the student"
        )
    return vocab


def _fused(hidden_ND: Tensor, head_weight_VD: Tensor, vocab: int, chunk_size: int, chunk_loss: ChunkLoss) -> Tensor:
    # needs_input_grad says True under no_grad as well: an evaluation must not pay for gradients.
    train = torch.is_grad_enabled()
    applied = _FusedHead.apply(hidden_ND, head_weight_VD, vocab, chunk_size, chunk_loss, train)  # type: ignore[no-untyped-call]
    return cast("Tensor", applied)


class _FusedHead(torch.autograd.Function):
    """hidden [N, D], weight [V, D] → summed loss; both gradients are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        vocab: int,
        chunk_size: int,
        chunk_loss: ChunkLoss,
        train: bool,
    ) -> Tensor:
        head_VD = weight_VD[:vocab]
        needs_hidden, needs_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        buffer_CV: Tensor | None = None
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, min(start + chunk_size, len(hidden_ND)))
            hidden_CD = hidden_ND[rows].to(weight_VD.dtype)
            buffer_CV = _logits(hidden_CD, head_VD, buffer_CV)
            loss += chunk_loss(buffer_CV, rows)
            gradient_CV = buffer_CV.to(weight_VD.dtype)
            if hidden_gradient_ND is not None:
                hidden_gradient_ND[rows] = gradient_CV @ head_VD
            if weight_gradient_VD is not None:
                _add_product(weight_gradient_VD[:vocab], gradient_CV.T, hidden_CD)
        ctx.gradients = (hidden_gradient_ND, weight_gradient_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass only")
        hidden_gradient_ND, weight_gradient_VD = ctx.gradients
        ctx.gradients = None
        if hidden_gradient_ND is not None:
            hidden_gradient_ND = hidden_gradient_ND.mul_(upstream)
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD.mul_(upstream).to(ctx.weight_dtype)
        return hidden_gradient_ND, weight_gradient_VD, None, None, None, None


class _TokenLogProbs(torch.autograd.Function):
    """hidden [N, D], weight [V, D] → log-probs [N]; the logits are made again in the backward pass.

    How much each position's gradient weighs is known only then, so nothing can be summed beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_ids_N: Tensor, vocab: int, chunk_size: int
    ) -> Tensor:
        log_probs_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        normaliser_N = torch.empty_like(log_probs_N)
        buffer_CV: Tensor | None = None
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, min(start + chunk_size, len(hidden_ND)))
            buffer_CV = _logits(hidden_ND[rows].to(weight_VD.dtype), weight_VD[:vocab], buffer_CV)
            target_C = buffer_CV.gather(1, target_ids_N[rows, None]).squeeze(1)
            peak_C = buffer_CV.amax(-1)
            normaliser_N[rows] = buffer_CV.sub_(peak_C[:, None]).exp_().sum(-1).log() + peak_C
            log_probs_N[rows] = target_C - normaliser_N[rows]
        ctx.save_for_backward(hidden_ND, weight_VD, target_ids_N, normaliser_N)
        ctx.settings = (vocab, chunk_size)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_ids_N, normaliser_N = ctx.saved_tensors
        vocab, chunk_size = ctx.settings
        head_VD = weight_VD[:vocab]
        hidden_gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffer_CV: Tensor | None = None
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, min(start + chunk_size, len(hidden_ND)))
            hidden_CD = hidden_ND[rows].to(weight_VD.dtype)
            buffer_CV = _logits(hidden_CD, head_VD, buffer_CV)
            buffer_CV.sub_(normaliser_N[rows, None]).exp_().mul_(-upstream_N[rows, None])
            buffer_CV.scatter_add_(1, target_ids_N[rows, None], upstream_N[rows, None])
            gradient_CV = buffer_CV.to(weight_VD.dtype)
            if hidden_gradient_ND is not None:
                hidden_gradient_ND[rows] = gradient_CV @ head_VD
            if weight_gradient_VD is not None:
                _add_product(weight_gradient_VD[:vocab], gradient_CV.T, hidden_CD)
        weight_gradient = None if weight_gradient_VD is None else weight_gradient_VD.to(weight_VD.dtype)
        return hidden_gradient_ND, weight_gradient, None, None, None


def _logits(hidden_CD: Tensor, head_VD: Tensor, buffer_CV: Tensor | None) -> Tensor:
    """Float32 logits of a chunk, written over the last chunk's where the dtypes allow."""
    if hidden_CD.dtype == torch.float32:
        if buffer_CV is None or len(buffer_CV) < len(hidden_CD):
            return hidden_CD @ head_VD.T
        return torch.mm(hidden_CD, head_VD.T, out=buffer_CV[: len(hidden_CD)])
    if hidden_CD.is_cuda:
        return torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32)
    return (hidden_CD @ head_VD.T).float()


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """sum += left @ right, accumulated in float32."""
    if left_VC.dtype == torch.float32:
        sum_VD.addmm_(left_VC, right_CD)
    elif left_VC.is_cuda:
        sum_VD.add_(torch.mm(left_VC, right_CD, out_dtype=torch.float32))
    else:
        sum_VD.add_(left_VC @ right_CD)
