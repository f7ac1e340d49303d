"""The Triton kernels of `kernels.py`. Importing this needs Triton.

A program of `peak_and_sum` reads one row, and one of `gradient` a block of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def peak_and_sum(logits, stride, width, inverse_temperature, largest, total, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The row's largest logit/T and Σ exp(logit/T − largest) in one pass: sums are rescaled as the largest grows."""
    row = tl.program_id(0).to(tl.int64)
    peak = -float("inf")
    sums = 0.0
    for block in range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + columns, mask=columns < width, other=-float("inf"))
        values = values * inverse_temperature
        higher = tl.maximum(peak, tl.max(values, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # ∞ − ∞ is not a number
        sums = sums * tl.exp(peak - shift) + tl.sum(tl.exp(values - shift), 0)
        peak = higher
    tl.store(largest + row, peak)
    tl.store(total + row, sums)


@triton.jit
def gradient(
    logits,
    stride,
    out,
    out_stride,
    first_id,
    width,
    inverse_temperature,
    shift,
    scale,
    masked_ids,
    masked,
    ids,
    values,
    valued,
    per_mass,
    profile,
    HAS_PROFILE: tl.constexpr,
    COPIES: tl.constexpr,
    MASKED: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale · exp(logit/T − shift), 0 at the masked ids, less the profile's part; then values are added at their ids.

    The barriers order the writes of a block's threads to the same logit.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    end = tl.minimum(begin + BLOCK, width)
    columns = begin + tl.arange(0, BLOCK)
    here = columns < end
    mine = logits + row * stride
    read = tl.load(mine + columns, mask=here, other=0.0)
    above = tl.minimum(read * inverse_temperature - tl.load(shift + row), 80.0)  # higher only where it is masked
    written = tl.load(scale + row) * tl.exp(above)
    tl.store(mine + columns, written, mask=here)
    tl.debug_barrier()
    slots = tl.arange(0, MASKED)
    local = tl.load(masked_ids + row * masked + slots, mask=slots < masked, other=-1) - first_id
    tl.store(mine + local, tl.zeros([MASKED], tl.float32), mask=(local >= begin) & (local < end))
    tl.debug_barrier()
    if HAS_PROFILE:
        part = tl.load(per_mass + row) * tl.load(profile + first_id + columns, mask=here, other=0.0)
        tl.store(mine + columns, tl.load(mine + columns, mask=here, other=0.0) - part, mask=here)
        tl.debug_barrier()
    slots = tl.arange(0, VALUES)
    known = slots < valued
    local = tl.load(ids + row * valued + slots, mask=known, other=-1) - first_id
    added = tl.load(values + row * valued + slots, mask=known, other=0.0)
    tl.atomic_add(mine + local, added, mask=known & (local >= begin) & (local < end))
    if COPIES:
        tl.debug_barrier()
        finished = tl.load(mine + columns, mask=here, other=0.0)
        tl.store(out + row * out_stride + columns, finished.to(out.dtype.element_ty), mask=here)
