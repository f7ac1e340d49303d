"""Choosing a next token: the most likely one, or one drawn from what temperature and top-p leave of the distribution.

Shape suffixes: B rows, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_tokens(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Choose one id a row, int64 [B]; temperature 0 takes the most likely one (of equal ones the smallest id).

    Returns the ids and their log-probs, float64 [B], under the distribution that they were drawn from; at temperature
    0, which draws nothing, under the model's own at temperature 1.

    Otherwise by inverse transform sampling: ids are sorted by decreasing probability (ties by increasing id) and cut
    off after the first at which their sum reaches `top_p` (Holtzman et al., arXiv 1904.09751); the one whose interval
    holds the row's uniform in [0, 1) is chosen. A row's choice depends on its logits and its uniform alone.
    Shapes: `logits_BV` float.
    """
    if temperature == 0.0:
        largest_B1 = logits_BV.amax(-1, keepdim=True)
        ids_B = (logits_BV == largest_B1).int().argmax(-1)
        return ids_B, (largest_B1[:, 0].double() - logits_BV.double().logsumexp(-1))
    probs_BV = torch.softmax(logits_BV.double() / temperature, -1)
    sorted_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    cumulated_BV = sorted_BV.cumsum(-1)
    kept_B = ((cumulated_BV - sorted_BV) < top_p).sum(-1, keepdim=True).clamp(min=1)
    total_B1 = cumulated_BV.gather(1, kept_B - 1)
    points_B1 = uniforms_B.to(cumulated_BV)[:, None] * total_B1
    places_B1 = torch.searchsorted(cumulated_BV, points_B1, right=True)
    places_B1 = torch.minimum(places_B1, kept_B - 1)
    log_probs_B1 = (sorted_BV.gather(1, places_B1) / total_B1).log()
    return ids_BV.gather(1, places_B1)[:, 0], log_probs_B1[:, 0]
