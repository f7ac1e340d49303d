"""Passes over hidden states and head in chunks: logits of a chunk, what a loss makes of them, and on to the next.

Shape suffixes: N positions, D hidden size, V rows of the head, C positions of a chunk.

Logits, softmax and sums over chunks are float32. Products take the weight's dtype, and add up and answer in float32: on
a GPU by themselves; a CPU has none like that for low precision, so there a slab of the head at a time is made float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Takes a chunk's float32 logits [C, V] and its rows, returns the summed loss, leaves the gradient in the logits' place.
ChunkLoss = Callable[[Tensor, slice], Tensor]

_SLAB = 8_192


class FusedLinearDivergence(torch.autograd.Function):
    """hidden [N, D], weight [V, D] → summed loss; both gradients are made on the way, chunk by chunk.

    That takes three matrix products a chunk, where making the logits again in the backward pass would take four.
    """

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
            gradient_CV = _for_products(buffer_CV, hidden_CD)
            if hidden_gradient_ND is not None:
                hidden_gradient_ND[rows] = _times_head(gradient_CV, head_VD)
            if weight_gradient_VD is not None:
                _add_outer(weight_gradient_VD[:vocab], gradient_CV, hidden_CD)
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


class TokenLogProbs(torch.autograd.Function):
    """hidden [N, D], weight [V, D] → log-probs [N] of one id each; the logits are made again in the backward pass.

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
            gradient_CV = _for_products(buffer_CV, hidden_CD)
            if hidden_gradient_ND is not None:
                hidden_gradient_ND[rows] = _times_head(gradient_CV, head_VD)
            if weight_gradient_VD is not None:
                _add_outer(weight_gradient_VD[:vocab], gradient_CV, hidden_CD)
        weight_gradient = None if weight_gradient_VD is None else weight_gradient_VD.to(weight_VD.dtype)
        return hidden_gradient_ND, weight_gradient, None, None, None


def _logits(hidden_CD: Tensor, head_VD: Tensor, buffer_CV: Tensor | None) -> Tensor:
    """Float32 logits of a chunk, written over the last chunk's where they fit."""
    if hidden_CD.dtype != torch.float32 and hidden_CD.is_cuda:
        return torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32)
    if buffer_CV is None or len(buffer_CV) < len(hidden_CD):
        buffer_CV = torch.empty(len(hidden_CD), len(head_VD), dtype=torch.float32, device=hidden_CD.device)
    logits_CV = buffer_CV[: len(hidden_CD)]
    if hidden_CD.dtype == torch.float32:
        return torch.mm(hidden_CD, head_VD.T, out=logits_CV)
    for slab in _slabs(head_VD):
        logits_CV[:, slab] = hidden_CD.float() @ head_VD[slab].float().T
    return logits_CV


def _for_products(gradient_CV: Tensor, hidden_CD: Tensor) -> Tensor:
    """The gradient in the type that products run in."""
    return gradient_CV.to(hidden_CD.dtype) if hidden_CD.is_cuda else gradient_CV


def _times_head(gradient_CV: Tensor, head_VD: Tensor) -> Tensor:
    """gradient @ head: the gradient of a chunk's hidden states."""
    if gradient_CV.dtype == head_VD.dtype:
        return gradient_CV @ head_VD
    sum_CD = gradient_CV.new_zeros(len(gradient_CV), head_VD.shape[1])
    for slab in _slabs(head_VD):
        sum_CD.addmm_(gradient_CV[:, slab], head_VD[slab].float())
    return sum_CD


def _add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradientᵀ @ hidden, in float32: a chunk's share of the head's gradient."""
    if gradient_CV.dtype == torch.float32:
        sum_VD.addmm_(gradient_CV.T, hidden_CD.float())
    else:
        sum_VD.add_(torch.mm(gradient_CV.T, hidden_CD, out_dtype=torch.float32))


def _slabs(head_VD: Tensor) -> Iterator[slice]:
    return (slice(start, min(start + _SLAB, len(head_VD))) for start in range(0, len(head_VD), _SLAB))
