"""What other projects keep of a teacher, built from their published descriptions: bytes, and the student's target.

A target is the distribution p̂ whose gradient with respect to the logits is q − p̂. Each rival is read in the best of
the ways that its authors offer. Where the layout packs bits, an id counts as ⌈log2 V⌉ bits.

- `topk50`: 50 log-probs in float16 with ids of 32 bits, renormalised (what most caches hold).
- `bucket100`: Megatron-LM's offline distillation: 100 true log-probs at 5 bytes per entry, everything else one event.
- `rskd50`: random-sampling distillation (arXiv 2503.16870): 50 independent draws, 24 bits per distinct id.
- `distillkit`, `distillkit_budget`: DistillKit's recommended and budget layouts: k = 128 with 16 values in bfloat16 and
  the others fitted by a polynomial of six terms in float32; k = 50 with one and three. The missing mass is one event.

Shape suffixes: N positions, V ids, K kept ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True)
class Kept:
    """What a rival keeps of N positions. `tail_N`: the missing mass, read as one event; None: none is kept."""

    ids_NK: Tensor
    probs_NK: Tensor
    tail_N: Tensor | None
    bytes_per_position: float


Rival = Callable[[Tensor, float], Kept]


def top_k_renormalised(log_probs_NV: Tensor, temperature: float, *, k: int = 50) -> Kept:
    """Values in float16, renormalised to sum to 1."""
    values_NK, ids_NK = log_probs_NV.topk(k)
    probs_NK = (values_NK.half().float() / temperature).softmax(-1)
    return Kept(ids_NK, probs_NK, None, k * (2 + 4))


def top_k_bucket(log_probs_NV: Tensor, temperature: float, *, k: int = 100) -> Kept:
    """Values in float16 and the rest as one event, whose probability the temperature transforms like an id's."""
    values_NK, ids_NK = log_probs_NV.topk(k)
    return _with_one_event(values_NK.half().float(), ids_NK, temperature, k * 5)


def random_sampling(log_probs_NV: Tensor, temperature: float, *, draws: int = 50) -> Kept:
    """Draws from the distribution at the given temperature; another temperature would need another cache."""
    probs_NV = (log_probs_NV / temperature).softmax(-1)
    generator = torch.Generator().manual_seed(int(log_probs_NV[0, 0].item() * -1e4) % 2**31)
    drawn_NK = torch.multinomial(probs_NV, draws, replacement=True, generator=generator).sort(-1).values
    distinct = 1 + (drawn_NK.diff(dim=-1) > 0).float().sum(-1)
    return Kept(drawn_NK, torch.full(drawn_NK.shape, 1 / draws), None, float(distinct.mean()) * 3)


def labels(log_probs_NV: Tensor, temperature: float) -> Kept:
    """One token sampled from the teacher at T = 1, as texts are: what training without a teacher learns from."""
    return dataclasses.replace(random_sampling(log_probs_NV, 1.0, draws=1), bytes_per_position=0.0)


def distillkit_recommended(log_probs_NV: Tensor, temperature: float) -> Kept:
    """k = 128: 16 exact, 112 fitted by 1, x, x², x³, x⁴ and √x."""
    return _distillkit(log_probs_NV, temperature, 128, 16, 6)


def distillkit_budget(log_probs_NV: Tensor, temperature: float) -> Kept:
    """k = 50: one exact, 49 fitted by 1, √x and x."""
    return _distillkit(log_probs_NV, temperature, 50, 1, 3)


RIVALS: dict[str, Rival] = {
    "topk50": top_k_renormalised,
    "bucket100": top_k_bucket,
    "rskd50": random_sampling,
    "distillkit": distillkit_recommended,
    "distillkit_budget": distillkit_budget,
}


# For the curve of excess KL against bytes.
OTHER_SIZES: dict[str, Rival] = {
    **{f"topk{k}": partial(top_k_renormalised, k=k) for k in (4, 12, 25)},
    **{f"bucket{k}": partial(top_k_bucket, k=k) for k in (4, 10, 25, 50)},
    **{f"rskd{n}": partial(random_sampling, draws=n) for n in (6, 12, 25, 100)},
}


def target_gradient(kept: Kept, student_NV: Tensor) -> Tensor:
    """q − p̂ [N, V] for a student q: the missing mass is spread over the missing ids in proportion to q."""
    gradient_NV = student_NV.clone()
    if kept.tail_N is not None:
        outside_NV = student_NV.scatter(1, kept.ids_NK, 0.0)
        gradient_NV -= outside_NV * (kept.tail_N / outside_NV.sum(-1))[:, None]
    return gradient_NV.scatter_add_(1, kept.ids_NK, -kept.probs_NK)


def _with_one_event(values_NK: Tensor, ids_NK: Tensor, temperature: float, size: float) -> Kept:
    tail_N = (1 - values_NK.double().exp().sum(-1)).clamp(min=1e-12).log().float()
    probs_NE = (torch.cat([values_NK, tail_N[:, None]], 1) / temperature).softmax(-1)
    return Kept(ids_NK, probs_NE[:, :-1], probs_NE[:, -1], size)


def _distillkit(log_probs_NV: Tensor, temperature: float, k: int, exact: int, terms: int) -> Kept:
    values_NK, ids_NK = log_probs_NV.topk(k)
    x = torch.arange(1, k - exact + 1, dtype=torch.float64) / (k - exact)
    powers = [x**0, x.sqrt(), x, x**2, x**3, x**4][:terms]
    basis = torch.stack(powers, 1)
    rest_NK = values_NK[:, exact:].double()
    coefficients = torch.linalg.lstsq(basis, rest_NK.T).solution.float()
    fitted_NK = (basis.float() @ coefficients).T
    values_NK = torch.cat([values_NK[:, :exact].bfloat16().float(), fitted_NK.clamp(max=0.0)], 1)
    bits = k * math.ceil(math.log2(log_probs_NV.shape[1])) + 16 * exact + 32 * terms
    return _with_one_event(values_NK, ids_NK, temperature, math.ceil(bits / 8))
