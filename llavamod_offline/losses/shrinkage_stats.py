"""Statistics for `shrinkage.py`: sums over the positions of an optimiser step, reduced to a few numbers per band.

Shape suffixes: N positions, V vocabulary, J feature columns, R bands, K top-k slots, M tail sample slots. Symbols: r
tail mass, v the student's tail shape, g the profile, û the tail samples, φ features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_EDGE, _EDGE_DECADES = 10, 0.45


@dataclass(frozen=True)
class TailView:
    """The teacher's and the student's tails at one chunk of positions; ids ≥ 0, empty slots have weight 0.

    `exponentials_NV` / `tail_sum_N` is v, 0 at the top-k ids. `rates_N` is r times the position's weight, 0 without
    tail samples. `outside_N`: the profile's mass outside each top-k, None without a profile.
    """

    exponentials_NV: Tensor
    tail_sum_N: Tensor
    rates_N: Tensor
    topk_ids_NK: Tensor
    topk_valid_NK: Tensor
    tail_ids_NM: Tensor
    tail_weights_NM: Tensor
    outside_N: Tensor | None


class ShrinkageSums:
    """Accumulates S = Σ r(û − v)⊗φ and the parts of G = Σ r(g − v)⊗φ over the micro-batches of a step.

    G = S − `rest` + g⊗`shared` with `rest` = Σ r·û⊗φ + Σ r·g(top-k)/`outside`⊗φ, so that the wide product with v is
    computed once. An id sampled twice at a position counts as two samples, whose weights are squared separately: this
    measures the noise of sampling, not what the samples agree on.
    """

    def __init__(self, vocab_size: int, columns: int, bands: int, device: torch.device) -> None:
        self._difference_VJ = torch.zeros(vocab_size, columns, device=device)
        self._rest_VJ = torch.zeros(vocab_size, columns, device=device)
        self._shared_J = torch.zeros(columns, device=device)
        self._noise_RJ = torch.zeros(bands, columns, device=device)
        self._squares_J = torch.zeros(columns, device=device)
        self._positions = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, view: TailView, features_NJ: Tensor, profile_V: Tensor | None, band_V: Tensor) -> None:
        """Add a chunk of positions; `band_V` is each id's band."""
        rates_N = view.rates_N
        counted_N = rates_N > 0
        features_NJ = torch.where(counted_N[:, None], features_NJ, 0.0)
        per_sum_N = torch.where(counted_N & (view.tail_sum_N > 0), rates_N / view.tail_sum_N, 0.0)
        self._difference_VJ.addmm_(view.exponentials_NV.T, per_sum_N[:, None] * features_NJ, alpha=-1)
        sample_weights_NM = rates_N[:, None] * view.tail_weights_NM
        tail_ids_L, samples_LJ = view.tail_ids_NM.flatten(), _spread(sample_weights_NM, features_NJ)
        self._difference_VJ.index_add_(0, tail_ids_L, samples_LJ)
        self._noise_RJ.index_add_(0, band_V[tail_ids_L], samples_LJ.square())
        if profile_V is not None and view.outside_N is not None:
            self._rest_VJ.index_add_(0, tail_ids_L, samples_LJ)
            per_mass_N = torch.where(counted_N, rates_N / view.outside_N, 0.0)
            topk_NK = torch.where(view.topk_valid_NK, profile_V[view.topk_ids_NK], 0.0) * per_mass_N[:, None]
            self._rest_VJ.index_add_(0, view.topk_ids_NK.flatten(), _spread(topk_NK, features_NJ))
            self._shared_J += (per_mass_N[:, None] * features_NJ).sum(0)
        self._squares_J += features_NJ.square().sum(0)
        self._positions += counted_N.sum()

    def statistics(self, profile_V: Tensor | None, band_V: Tensor, bands: int) -> Tensor:
        """S·G, G·G, ‖S‖² − B and B per band, then n² and n: [4·R + 2] float64; features scaled to mean square 1."""
        scale_J = torch.where(self._squares_J > 0, self._positions.float() / self._squares_J, 0.0)
        sums_4V = torch.zeros(4, len(band_V), dtype=torch.float64, device=band_V.device)
        difference_VJ = self._difference_VJ
        if profile_V is not None:
            guided_VJ = difference_VJ - self._rest_VJ + torch.outer(profile_V, self._shared_J)
            sums_4V[0] = (difference_VJ * guided_VJ) @ scale_J
            sums_4V[1] = guided_VJ.square() @ scale_J
        sums_4V[2] = difference_VJ.square() @ scale_J
        sums_4R = torch.zeros(4, bands, dtype=torch.float64, device=band_V.device).index_add_(1, band_V, sums_4V)
        sums_4R[3] = self._noise_RJ @ scale_J
        sums_4R[2] -= sums_4R[3]
        return torch.cat([sums_4R.flatten(), self._positions[None] ** 2, self._positions[None]])


def bands(vocab_size: int, profile_V: Tensor | None) -> Tensor:
    """Each id's band, [V]: by descending profile probability (by id without a profile), on a log scale of ranks.

    The first band holds the ten most likely ids; each further band ends at 10^0.45 times the rank of the previous one.
    """
    order_V = torch.arange(vocab_size)
    if profile_V is not None:
        order_V = profile_V.cpu().argsort(descending=True, stable=True)
    steps = max(0, math.ceil(math.log10(max(vocab_size, 1) / _FIRST_EDGE) / _EDGE_DECADES))
    edges = torch.tensor([math.ceil(_FIRST_EDGE * 10 ** (_EDGE_DECADES * k)) for k in range(steps)], dtype=torch.long)
    band_V = torch.empty(vocab_size, dtype=torch.long)
    band_V[order_V] = torch.searchsorted(edges, torch.arange(vocab_size), right=True)
    return band_V


def _spread(weights_NK: Tensor, features_NJ: Tensor) -> Tensor:
    """weight · features of each slot, [N · K, J]."""
    return (weights_NK[:, :, None] * features_NJ[:, None, :]).flatten(0, 1)
