"""Fused linear layer and loss: LM head and loss are computed in chunks, never for all positions and ids at once.

Shape suffixes: N positions, D hidden size, V rows of the LM head, C positions of a chunk, W ids of a slab.

Logits, softmax and sums over chunks are float32. Matrix products take operands in the weight's dtype and accumulate in
float32. CPUs have no such low-precision product, so there the LM head is converted to float32 one slab at a time.

There are two orders of work. By chunks of positions, a chunk's logits become its gradient in place: three products per
logit, and the LM head's gradient is a float32 sum [V, D] over chunks. On a GPU in half precision, reading and writing
that sum for each chunk takes longer than the products, and it is twice as large as the gradient. There a first pass
over positions measures the rows, and a second one over slabs of ids recomputes their logits (four products) and gives
each row of the LM head its whole gradient at once, in its own dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.losses.chunk_gradients import Measured
from llavamod_offline.losses.rows.gradients import RowGradients
from llavamod_offline.losses.rows.kernels import peaks_and_sums
from llavamod_offline.losses.rows.losses import MeasuredRowLoss, RowLoss
from llavamod_offline.models.lm_head import LmHead, float32_products

_SLAB = 8_192
_CHUNK_SIZE = 256


class FusedLinearDivergence(torch.autograd.Function):
    """hidden states [N, D], LM head → summed loss; the forward pass computes all gradients as well.

    That takes three matrix products per chunk; recomputing the logits in the backward pass would take four. Weight and
    bias, which `head` holds too, are passed separately so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: LmHead,
        vocab: int,
        chunk_size: int | None,
        row_loss: RowLoss,
        train: bool,
    ) -> Tensor:
        needs = [train and needed for needed in ctx.needs_input_grad[:3]]
        if isinstance(row_loss, MeasuredRowLoss) and goes_by_slabs(weight_VD):
            loss, plans = _measured_loss(hidden_ND, head.first(vocab), chunk_size, row_loss)
            ctx.gradients = gradients_by_slabs(hidden_ND, head, vocab, chunk_size, plans, needs)
        else:
            size = chunk_size or _CHUNK_SIZE
            loss, ctx.gradients = _loss_and_gradients(hidden_ND, head, vocab, size, row_loss, needs)
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

    The backward pass recomputes the logits, because only then is each position's upstream gradient known.
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
        chunk_size: int | None,
    ) -> Tensor:
        pieces = [2 * (hidden_ND.new_zeros(0, dtype=torch.float32),)]
        for rows, _, logits_CV in _chunks(hidden_ND, head.first(vocab), chunk_size or _chunk_rows(head.weight_VD)):
            target_C = logits_CV.gather(1, target_ids_N[rows, None]).squeeze(1)
            _, shift_C, sum_C = peaks_and_sums(logits_CV, 1.0)
            normaliser_C = sum_C.log() + shift_C
            pieces.append((normaliser_C, target_C - normaliser_C))
        normaliser_N, log_probs_N = map(torch.cat, zip(*pieces, strict=True))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_ids_N, normaliser_N)
        ctx.settings = (head.softcap, head.scale, vocab, chunk_size)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_ids_N, normaliser_N = ctx.saved_tensors

        softcap, scale, vocab, chunk_size = ctx.settings
        head = LmHead(weight_VD, bias_V, softcap, scale)
        gradients = RowGradients(
            temperature=1.0,
            shift_N=normaliser_N,
            scale_N=-upstream_N,
            masked_ids_NK=target_ids_N.new_zeros(len(target_ids_N), 0),
            ids_NX=target_ids_N[:, None],
            values_NX=upstream_N[:, None],
        )
        needs = ctx.needs_input_grad[:3]
        found = gradients_by_slabs(hidden_ND, head, vocab, chunk_size, [gradients], needs)
        return *found, None, None, None, None, None


def _loss_and_gradients(
    hidden_ND: Tensor, head: LmHead, vocab: int, chunk_size: int, row_loss: RowLoss, needs: Sequence[bool]
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
        loss += row_loss.in_place(logits_CV, rows)
        if isinstance(slope_CV, Tensor) or slope_CV != 1.0:
            logits_CV.mul_(slope_CV)
        if hidden_gradient_ND is not None:
            hidden_gradient_ND[rows] = _times_weight(logits_CV, used.weight_VD)
        if weight_gradient_VD is not None:
            _add_outer(weight_gradient_VD[:vocab], logits_CV, hidden_CD)
        if bias_gradient_V is not None:
            bias_gradient_V[:vocab] += logits_CV.sum(0)
    return loss, (hidden_gradient_ND, weight_gradient_VD, bias_gradient_V)


def _measured_loss(
    hidden_ND: Tensor, head: LmHead, chunk_size: int | None, loss: MeasuredRowLoss
) -> tuple[Tensor, Sequence[RowGradients]]:
    """The first pass: the summed loss, and what the second one needs."""
    chunks = _chunks(hidden_ND, head, chunk_size or _chunk_rows(head.weight_VD))
    measured = [loss.measure(logits_CV, rows) for rows, _, logits_CV in chunks]
    if not measured:
        return torch.zeros((), dtype=torch.float32, device=hidden_ND.device), []
    return loss.plan([Measured(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*measured, strict=True)])


def gradients_by_slabs(
    hidden_ND: Tensor,
    head: LmHead,
    vocab: int,
    chunk_size: int | None,
    gradients: Sequence[RowGradients],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden states, weight and bias, each in its dtype and where `needs` is true.

    A slab has as many logits as `chunk_size` positions have, or by default about as many as the hidden states have
    elements.
    """
    if not any(needs):
        return None, None, None
    weight_VD, bias_V = head.weight_VD, head.bias_V
    hidden_ND = hidden_ND.detach()
    inputs_ND = hidden_ND.to(weight_VD.dtype)
    hidden_sum_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if needs[0] else None
    weight_gradient_VD = torch.zeros_like(weight_VD) if needs[1] else None
    bias_gradient_V = torch.zeros_like(bias_V) if needs[2] and bias_V is not None else None
    width = max(256, weight_VD.shape[1] * 2 // 3 // 256 * 256)  # a multiple for which products are fast
    if chunk_size is not None:
        width = max(1, chunk_size * vocab // max(len(hidden_ND), 1))
    # On a GPU products take operands in the weight's dtype, on a CPU in float32.
    dtype = weight_VD.dtype if weight_VD.is_cuda else torch.float32
    logits_NW = torch.empty(len(hidden_ND), min(width, vocab), dtype=torch.float32, device=hidden_ND.device)
    gradient_NW = logits_NW if dtype == torch.float32 else torch.empty_like(logits_NW, dtype=dtype)
    for start in range(0, vocab if gradients else 0, width):
        stop = min(start + width, vocab)
        part = head.part(start, stop)
        logits_NW, gradient_NW = logits_NW[:, : stop - start], gradient_NW[:, : stop - start]
        logits_NW = part.finish_(float32_products(inputs_ND, part.weight_VD, logits_NW))
        _write_sum(gradients, logits_NW, start, part.slope(logits_NW), gradient_NW)
        if weight_gradient_VD is not None:
            _write_outer(weight_gradient_VD[start:stop], gradient_NW, inputs_ND)
        if hidden_sum_ND is not None:
            _add_product(hidden_sum_ND, gradient_NW, part.weight_VD)
        if bias_gradient_V is not None:
            bias_gradient_V[start:stop] = gradient_NW.sum(0, dtype=torch.float32)
    hidden_gradient_ND = None if hidden_sum_ND is None else hidden_sum_ND.to(hidden_ND.dtype)
    return hidden_gradient_ND, weight_gradient_VD, bias_gradient_V


def _write_sum(
    gradients: Sequence[RowGradients], logits_NW: Tensor, start: int, slope_NW: Tensor | float, out_NW: Tensor
) -> None:
    """Write the sum of the gradients, times the slope, to `out_NW`; overwrites the logits, which may be the same."""
    *others, last = gradients
    if not others and not isinstance(slope_NW, Tensor):
        last.times(slope_NW).write(logits_NW, start, out_NW)
        return
    apart = [logits_NW.clone() for _ in others]
    last.write(logits_NW, start, logits_NW)
    for other, other_NW in zip(others, apart, strict=True):
        other.write(other_NW, start, other_NW)
        logits_NW.add_(other_NW)
    out_NW.copy_(logits_NW.mul_(slope_NW))


def goes_by_slabs(weight_VD: Tensor) -> bool:
    """Whether slabs of ids are the faster order of work: on a GPU, in half precision."""
    return weight_VD.is_cuda and weight_VD.dtype != torch.float32


def _chunk_rows(weight_VD: Tensor) -> int:
    """Positions per chunk: enough for fast products, with logits at most half as large as the LM head's gradient."""
    return max(_CHUNK_SIZE, weight_VD.shape[1] // 4) if weight_VD.is_cuda else _CHUNK_SIZE


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
    """gradient @ weight in float32: the gradient of a chunk's hidden states."""
    if weight_VD.dtype == torch.float32:
        return gradient_CV @ weight_VD
    sum_CD = gradient_CV.new_zeros(len(gradient_CV), weight_VD.shape[1])
    for start in range(0, len(weight_VD), _SLAB):
        slab = slice(start, start + _SLAB)
        sum_CD.addmm_(gradient_CV[:, slab], weight_VD[slab].float())
    return sum_CD


def _add_outer(sum_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += gradientᵀ @ hidden, in float32: a chunk's share of the LM head's gradient."""
    sum_VD.addmm_(gradient_CV.T, hidden_CD.float())


def _write_outer(out_WD: Tensor, gradient_NW: Tensor, hidden_ND: Tensor) -> None:
    """out = gradientᵀ @ hidden, summed in float32: the whole gradient of a slab of the LM head."""
    if gradient_NW.dtype == out_WD.dtype:
        torch.mm(gradient_NW.T, hidden_ND, out=out_WD)
    else:
        out_WD.copy_(gradient_NW.T @ hidden_ND.to(gradient_NW.dtype))


def _add_product(sum_ND: Tensor, left_NW: Tensor, right_WD: Tensor) -> None:
    """sum += left @ right, in float32."""
    if left_NW.dtype == torch.float32:
        sum_ND.addmm_(left_NW, right_WD.float())
    elif _adds_mixed(left_NW.device, left_NW.dtype):
        torch.addmm(sum_ND, left_NW, right_WD, out_dtype=torch.float32, out=sum_ND)
    else:
        sum_ND.add_(torch.mm(left_NW, right_WD, out_dtype=torch.float32))


@functools.cache
def _adds_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device adds a product in half precision to a float32 sum."""
    one_11, sum_11 = torch.ones(1, 1, device=device, dtype=dtype), torch.ones(1, 1, device=device)
    try:
        torch.addmm(sum_11, one_11, one_11, out_dtype=torch.float32, out=sum_11)
    except (RuntimeError, TypeError):
        return False
    return True
