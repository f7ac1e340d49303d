"""Passes over rows of logits [N, V]: one read each on a GPU with Triton; otherwise PyTorch's own operations.

Shape suffixes: N rows (R of them at once), V ids, W ids of a slab, K masked ids, X ids with values of their own.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

_BLOCK = 4_096
_ROWS = 32  # copied at once without Triton


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device."""
    return device.type == "cuda" and _has_triton()


def peaks_and_sums(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest logit/T, the same but 0 for −inf, and Σ exp(logit/T − that), [N] each. Keeps the logits."""
    if has_kernels(logits_NV.device):
        largest_N, sum_N = torch.empty_like(logits_NV[:, 0]), torch.empty_like(logits_NV[:, 0])
        width = logits_NV.shape[1]
        block = _block(width)
        _kernels().peak_and_sum[(len(logits_NV),)](
            logits_NV,
            logits_NV.stride(0),
            width,
            1 / temperature,
            largest_N,
            sum_N,
            BLOCKS=-(-width // block),
            BLOCK=block,
        )
        return largest_N, largest_N.masked_fill(torch.isneginf(largest_N), 0.0), sum_N
    largest_N = logits_NV.amax(-1).div_(temperature)
    shift_N = largest_N.masked_fill(torch.isneginf(largest_N), 0.0)
    sums = [
        torch.div(logits_RV, temperature).sub_(shift_R[:, None]).exp_().sum(-1)
        for logits_RV, shift_R in zip(logits_NV.split(_ROWS), shift_N.split(_ROWS), strict=True)
    ]
    return largest_N, shift_N, torch.cat(sums)


def write_gradients(
    logits_NW: Tensor,
    out_NW: Tensor,
    *,
    start: int,
    temperature: float,
    shift_N: Tensor,
    scale_N: Tensor,
    masked_ids_NK: Tensor,
    ids_NX: Tensor,
    values_NX: Tensor,
    per_mass_N: Tensor | None,
    profile_V: Tensor | None,
) -> None:
    """Write the gradient of a slab of ids from `start` on; see `RowGradients`. Overwrites `logits_NW` (float32)."""
    rows, width = logits_NW.shape
    if not rows:
        return
    masked, values = masked_ids_NK.shape[1], ids_NX.shape[1]
    block = _block(width)
    _kernels().gradient[(rows, -(-width // block))](
        logits_NW,
        logits_NW.stride(0),
        out_NW,
        out_NW.stride(0),
        start,
        width,
        1 / temperature,
        shift_N.contiguous(),
        scale_N.contiguous(),
        masked_ids_NK.contiguous(),
        masked,
        ids_NX.contiguous(),
        values_NX.contiguous(),
        values,
        shift_N if per_mass_N is None else per_mass_N.contiguous(),
        shift_N if profile_V is None else profile_V.contiguous(),
        HAS_PROFILE=per_mass_N is not None,
        COPIES=out_NW is not logits_NW,
        MASKED=_power_of_two(masked),
        VALUES=_power_of_two(values),
        BLOCK=block,
    )


def _block(width: int) -> int:
    return min(_BLOCK, _power_of_two(width))


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    from llavamod_offline.losses.rows import triton_kernels

    return triton_kernels
