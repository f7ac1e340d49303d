"""Fused linear layer and loss: the LM head and the loss are computed chunk by chunk of positions.

Shape suffixes: N positions, D hidden size, V rows of the LM head, C positions of a chunk.

Logits, softmax and sums over chunks are float32. Matrix products take operands in the weight's dtype and accumulate in
float32. CPUs have no such low-precision product, so there the LM head is converted to float32 one slab at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Takes a chunk's float32 logits [C, V] and its rows, replaces the logits by their gradient, returns the summed loss.
ChunkLoss = Callable[[Tensor, slice], Tensor]

_SLAB = 8_192


class FusedLinearDivergence(torch.autograd.Function):
    """hidden states [N, D], LM head [V, D] → summed loss; the forward pass computes both gradients as well.

    That takes three matrix products per chunk; recomputing the logits in the backward pass would take four.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, lm_head_VD: Tensor, vocab: int, chunk_size: int, chunk_loss: ChunkLoss, train: bool
    ) -> Tensor:
        needs = [train and needed for needed in ctx.needs_input_grad[:2]]
        loss, *ctx.gradients = _loss_and_gradients(hidden_ND, lm_head_VD, vocab, chunk_size, chunk_loss, needs)
        ctx.dtype = lm_head_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass only")
        hidden_gradient_ND, lm_head_gradient_VD = ctx.gradients
        ctx.gradients = None
        if hidden_gradient_ND is not None:
            hidden_gradient_ND = hidden_gradient_ND.mul_(upstream)
        if lm_head_gradient_VD is not None:
            lm_head_gradient_VD = lm_head_gradient_VD.mul_(upstream).to(ctx.dtype)
        return hidden_gradient_ND, lm_head_gradient_VD, None, None, None, None


class TokenLogProbs(torch.autograd.Function):
    """hidden states [N, D], LM head [V, D] → log-probs [N] of one id per position.

    The backward pass recomputes the logits, since only then each position's upstream gradient is known.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, lm_head_VD: Tensor, target_ids_N: Tensor, vocab: int, chunk_size: int
    ) -> Tensor:
        log_probs_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        normaliser_N = torch.empty_like(log_probs_N)
        for rows, _, logits_CV in _chunks(hidden_ND, lm_head_VD[:vocab], chunk_size):
            target_C = logits_CV.gather(1, target_ids_N[rows, None]).squeeze(1)
            peak_C = logits_CV.amax(-1)
            normaliser_N[rows] = logits_CV.sub_(peak_C[:, None]).exp_().sum(-1).log() + peak_C
            log_probs_N[rows] = target_C - normaliser_N[rows]
        ctx.save_for_backward(hidden_ND, lm_head_VD, target_ids_N, normaliser_N)
        ctx.settings = (vocab, chunk_size)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, lm_head_VD, target_ids_N, normaliser_N = ctx.saved_tensors

        def chunk_gradient(logits_CV: Tensor, rows: slice) -> Tensor:
            logits_CV.sub_(normaliser_N[rows, None]).exp_().mul_(-upstream_N[rows, None])
            logits_CV.scatter_add_(1, target_ids_N[rows, None], upstream_N[rows, None])
            return upstream_N.new_zeros(())

        vocab, chunk_size = ctx.settings
        _, hidden_gradient_ND, lm_head_gradient_VD = _loss_and_gradients(
            hidden_ND, lm_head_VD, vocab, chunk_size, chunk_gradient, ctx.needs_input_grad[:2]
        )
        if lm_head_gradient_VD is not None:
            lm_head_gradient_VD = lm_head_gradient_VD.to(lm_head_VD.dtype)
        return hidden_gradient_ND, lm_head_gradient_VD, None, None, None


def _loss_and_gradients(
    hidden_ND: Tensor, lm_head_VD: Tensor, vocab: int, chunk_size: int, chunk_loss: ChunkLoss, needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss and, if `needs` is true, the gradients of hidden states (their dtype) and LM head (float32)."""
    used_VD = lm_head_VD[:vocab]
    hidden_gradient_ND = torch.empty_like(hidden_ND) if needs[0] else None
    lm_head_gradient_VD = torch.zeros_like(lm_head_VD, dtype=torch.float32) if needs[1] else None
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for rows, hidden_CD, logits_CV in _chunks(hidden_ND, used_VD, chunk_size):
        loss += chunk_loss(logits_CV, rows)
        # Products run in the hidden states' dtype, but in float32 on a CPU.
        gradient_CV = logits_CV.to(hidden_CD.dtype) if hidden_CD.is_cuda else logits_CV
        if hidden_gradient_ND is not None:
            hidden_gradient_ND[rows] = _times_lm_head(gradient_CV, used_VD)
        if lm_head_gradient_VD is not None:
            _add_outer(lm_head_gradient_VD[:vocab], gradient_CV, hidden_CD)
    return loss, hidden_gradient_ND, lm_head_gradient_VD


def _chunks(hidden_ND: Tensor, lm_head_VD: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk's rows, hidden states and float32 logits; the next chunk's logits may overwrite them."""
    logits_CV: Tensor | None = None
    for start in range(0, len(hidden_ND), chunk_size):
        rows = slice(start, min(start + chunk_size, len(hidden_ND)))
        hidden_CD = hidden_ND[rows].to(lm_head_VD.dtype)
        logits_CV = _logits(hidden_CD, lm_head_VD, logits_CV)
        yield rows, hidden_CD, logits_CV


def _logits(hidden_CD: Tensor, lm_head_VD: Tensor, buffer_CV: Tensor | None) -> Tensor:
    """Float32 logits of a chunk, written into `buffer_CV` if they fit."""
    if hidden_CD.dtype != torch.float32 and hidden_CD.is_cuda:
        return torch.mm(hidden_CD, lm_head_VD.T, out_dtype=torch.float32)
    if buffer_CV is None or len(buffer_CV) < len(hidden_CD):
        buffer_CV = torch.empty(len(hidden_CD), len(lm_head_VD), dtype=torch.float32, device=hidden_CD.device)
    logits_CV = buffer_CV[: len(hidden_CD)]
    if hidden_CD.dtype == torch.float32:
        return torch.mm(hidden_CD, lm_head_VD.T, out=logits_CV)
    for slab in _slabs(lm_head_VD):
        logits_CV[:, slab] = hidden_CD.float() @ lm_head_VD[slab].float().T
    return logits_CV


def _times_lm_head(gradient_CV: Tensor, lm_head_VD: Tensor) -> Tensor:
    """gradient @ LM head: the gradient of a chunk's hidden states."""
    if gradient_CV.dtype == lm_head_VD.dtype:
        return gradient_CV @ lm_head_VD
    sum_CD = gradient_CV.new_zeros(len(gradient_CV), lm_head_VD.shape[1])
    for slab in _slabs(lm_head_VD):
        sum_CD.addmm_(gradient_CV[:, slab], lm_head_VD[slab].float())
    return sum_CD


def _add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradientᵀ @ hidden, in float32: a chunk's share of the LM head's gradient."""
    if gradient_CV.dtype == torch.float32:
        sum_VD.addmm_(gradient_CV.T, hidden_CD.float())
    else:
        sum_VD.add_(torch.mm(gradient_CV.T, hidden_CD, out_dtype=torch.float32))


def _slabs(lm_head_VD: Tensor) -> Iterator[slice]:
    return (slice(start, min(start + _SLAB, len(lm_head_VD))) for start in range(0, len(lm_head_VD), _SLAB))
