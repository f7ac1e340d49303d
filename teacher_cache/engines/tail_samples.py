"""Systematic sampling of tail ids, with uniforms that depend on (seed, key, role, position) alone.

Shape suffixes: N positions (R of them in a chunk), V ids.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TWO_53 = float(2**53)


def sequence_uniforms(seed: int, key: str, role: str, count: int) -> NDArray[np.float64]:
    """One uniform number in [0, 1) for each of the first `count` positions of a sequence.

    A counter-based generator: the 64-bit BLAKE2b of seed, key and role is the stream, the position the counter, and
    SplitMix64's finaliser the mixing function (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
    2014). Nothing else enters, so a record is the same whatever the batch, worker or restart.
    """
    name = "\0".join((str(seed), key, role)).encode()
    stream = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(stream)
    counter = (counter ^ (counter >> np.uint64(30))) * _MIX_1
    counter = (counter ^ (counter >> np.uint64(27))) * _MIX_2
    counter ^= counter >> np.uint64(31)
    return (counter >> np.uint64(11)).astype(np.float64) / _TWO_53


def tail_sample_budget(log_tail_mass_N: Tensor, tail_samples_max: int, tail_samples_per_mass: float) -> Tensor:
    """The number of tail samples at each position: in proportion to the tail's mass, at least one if it has any.

    The variance of a tail of mass r estimated from m samples is about r²/m, so a fixed total is best spent with m ∝ r.
    Result: [N] int64 in 1…`tail_samples_max`, and 0 where the log mass is −inf or `tail_samples_max` is 0.
    """
    wanted = (log_tail_mass_N.double().exp() * tail_samples_per_mass).ceil().clamp(1, max(tail_samples_max, 1)).long()
    return torch.where(torch.isneginf(log_tail_mass_N) | (tail_samples_max == 0), torch.zeros_like(wanted), wanted)


def tail_samples(weights_RV: Tensor, uniforms_R: Tensor, budget_R: Tensor, most: int) -> Tensor:
    """Draw `budget_R` ids a row by systematic sampling in order of id; an id may be drawn several times.

    Row r puts budget points at (u + j) / budget, j = 0, 1, …, on the cumulative weights, so in expectation id v is
    drawn budget · w(v) / Σw times: unbiased, and with at most the variance of as many independent draws when ids are
    drawn about once or more.

    Shapes: `weights_RV` ≥ 0, finite, each row with a budget having a positive sum; `uniforms_R` float64 in [0, 1);
    budgets of at most `most`. Result: [R, most] int64; in each row the first `budget_R` ids ascend, the others are
    arbitrary.
    Sums are taken over blocks of ids, accumulated in float64, then inside the blocks that were hit: one pass over V,
    not a full float64 cumulative sum, and no id's share is off by more than float32 rounding of its own block.
    """
    rows, width = weights_RV.shape
    if most == 0 or rows == 0:
        return torch.zeros(rows, most, dtype=torch.long, device=weights_RV.device)
    size = 2 ** (width.bit_length() // 2)
    blocks = -(-width // size)
    blocked = torch.nn.functional.pad(weights_RV, (0, blocks * size - width)).view(rows, blocks, size)
    cumulated = blocked.sum(-1).double().cumsum(-1)
    steps = torch.arange(most, device=weights_RV.device)
    share = (uniforms_R[:, None] + steps) / budget_R.clamp(min=1)[:, None]
    block, inside = _locate(cumulated, share * cumulated[:, -1:])
    row = torch.arange(rows, device=weights_RV.device)[:, None].expand(-1, most)
    hit = blocked[row, block].double().cumsum(-1).flatten(0, 1)
    offset, _ = _locate(hit, inside.reshape(-1, 1) * hit[:, -1:])
    ids_RM: Tensor = block * size + offset.view(rows, most)
    return ids_RM


def _locate(cumulated: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Find the interval of each row's cumulative weights that holds each point, and the point's place in it, 0 to 1."""
    total = cumulated[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not push a point past the last interval
    points = torch.minimum(points, below).clamp(min=0).contiguous()
    index = torch.searchsorted(cumulated.contiguous(), points, right=True).clamp(max=cumulated.shape[1] - 1)
    end = cumulated.gather(1, index)
    start = torch.where(index > 0, cumulated.gather(1, (index - 1).clamp(min=0)), torch.zeros_like(end))
    return index, ((points - start) / (end - start)).nan_to_num(0.0)
