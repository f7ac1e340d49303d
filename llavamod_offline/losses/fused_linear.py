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

from llavamod_offline.models.lm_head import LmHead, float32_products

# Takes a chunk's float32 logits [C, V] and its rows, replaces the logits by their gradient, returns the summed loss.
ChunkLoss = Callable[[Tensor, slice], Tensor]

_SLAB = 8_192


class FusedLinearDivergence(torch.autograd.Function):
    """hidden states [N, D], LM head → summed loss; the forward pass computes all gradients as well.

    That takes three matrix products per chunk; recomputing the logits in the backward pass would take four. Weight and
    bias are passed beside `head`, which has the same ones, for autograd to see them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: LmHead,
        vocab: int,
        chunk_size: int,
        chunk_loss: ChunkLoss,
        train: bool,
    ) -> Tensor:
        needs = [train and needed for needed in ctx.needs_input_grad[:3]]
        loss, ctx.gradients = _loss_and_gradients(hidden_ND, head, vocab, chunk_size, chunk_loss, needs)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass only")
        gradients, ctx.gradients = ctx.gradients, None
        pairs = zip(gradients, ctx.dtypes, strict=True)
        scaled = [None if gradient is None else gradient.mul_(upstream).to(dtype) for gradient, dtype in pairs]
        return *scaled, None, None, None, None, None


class TokenLogProbs(torch.autograd.Function):
    """hidden states [N, D], LM head → log-probs [N] of one id per position; see `FusedLinearDivergence`.

    The backward pass recomputes the logits, since only then each position's upstream gradient is known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: LmHead,
        target_ids_N: Tensor,
        vocab: int,
        chunk_size: int,
    ) -> Tensor:
        log_probs_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        normaliser_N = torch.empty_like(log_probs_N)
        for rows, _, logits_CV in _chunks(hidden_ND, head.first(vocab), chunk_size):
            target_C = logits_CV.gather(1, target_ids_N[rows, None]).squeeze(1)
            peak_C = logits_CV.amax(-1)
            normaliser_N[rows] = logits_CV.sub_(peak_C[:, None]).exp_().sum(-1).log() + peak_C
            log_probs_N[rows] = target_C - normaliser_N[rows]
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_ids_N, normaliser_N)
        ctx.settings = (head.softcap, head.scale, vocab, chunk_size)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_ids_N, normaliser_N = ctx.saved_tensors

        def chunk_gradient(logits_CV: Tensor, rows: slice) -> Tensor:
            logits_CV.sub_(normaliser_N[rows, None]).exp_().mul_(-upstream_N[rows, None])
            logits_CV.scatter_add_(1, target_ids_N[rows, None], upstream_N[rows, None])
            return upstream_N.new_zeros(())

        softcap, scale, vocab, chunk_size = ctx.settings
        head = LmHead(weight_VD, bias_V, softcap, scale)
        _, (hidden_gradient_ND, weight_gradient_VD, bias_gradient_V) = _loss_and_gradients(
            hidden_ND, head, vocab, chunk_size, chunk_gradient, ctx.needs_input_grad[:3]
        )
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD.to(weight_VD.dtype)
        if bias_gradient_V is not None:
            bias_gradient_V = bias_gradient_V.to(bias_V.dtype)
        return hidden_gradient_ND, weight_gradient_VD, bias_gradient_V, None, None, None, None


def _loss_and_gradients(
    hidden_ND: Tensor, head: LmHead, vocab: int, chunk_size: int, chunk_loss: ChunkLoss, needs: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The summed loss and, where `needs` is true, the gradients of hidden states (their dtype), weight and bias.

    Those of weight and bias are float32.
    """
    used = head.first(vocab)
    hidden_gradient_ND = torch.empty_like(hidden_ND) if needs[0] else None
    weight_gradient_VD = torch.zeros_like(head.weight_VD, dtype=torch.float32) if needs[1] else None
    bias_gradient_V = torch.zeros(head.rows, device=hidden_ND.device) if needs[2] else None
    loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for rows, hidden_CD, logits_CV in _chunks(hidden_ND, used, chunk_size):
        slope_CV = used.slope(logits_CV) if any(needs) else 1.0
        loss += chunk_loss(logits_CV, rows)
        if isinstance(slope_CV, Tensor) or slope_CV != 1.0:
            logits_CV.mul_(slope_CV)
        # Products run in the hidden states' dtype, but in float32 on a CPU.
        gradient_CV = logits_CV.to(hidden_CD.dtype) if hidden_CD.is_cuda else logits_CV
        if hidden_gradient_ND is not None:
            hidden_gradient_ND[rows] = _times_weight(gradient_CV, used.weight_VD)
        if weight_gradient_VD is not None:
            _add_outer(weight_gradient_VD[:vocab], gradient_CV, hidden_CD)
        if bias_gradient_V is not None:
            bias_gradient_V[:vocab] += logits_CV.sum(0)
    return loss, (hidden_gradient_ND, weight_gradient_VD, bias_gradient_V)


def _chunks(hidden_ND: Tensor, head: LmHead, chunk_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk's rows, hidden states and float32 logits; the next chunk's logits may overwrite them."""
    weight_VD = head.weight_VD
    logits_CV: Tensor | None = None
    for start in range(0, len(hidden_ND), chunk_size):
        rows = slice(start, min(start + chunk_size, len(hidden_ND)))
        hidden_CD = hidden_ND[rows].to(weight_VD.dtype)
        buffer_CV = None if logits_CV is None else logits_CV[: len(hidden_CD)]
        logits_CV = head.finish_(float32_products(hidden_CD, weight_VD, buffer_CV))
        yield rows, hidden_CD, logits_CV


def _times_weight(gradient_CV: Tensor, weight_VD: Tensor) -> Tensor:
    """gradient @ weight: the gradient of a chunk's hidden states."""
    if gradient_CV.dtype == weight_VD.dtype:
        return gradient_CV @ weight_VD
    sum_CD = gradient_CV.new_zeros(len(gradient_CV), weight_VD.shape[1])
    for start in range(0, len(weight_VD), _SLAB):
        slab = slice(start, start + _SLAB)
        sum_CD.addmm_(gradient_CV[:, slab], weight_VD[slab].float())
    return sum_CD


def _add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradientᵀ @ hidden, in float32: a chunk's share of the LM head's gradient."""
    if gradient_CV.dtype == torch.float32:
        sum_VD.addmm_(gradient_CV.T, hidden_CD.float())
    else:
        sum_VD.add_(torch.mm(gradient_CV.T, hidden_CD, out_dtype=torch.float32))
