"""The tail estimator `shrink`: learns in training how much to trust tail samples and the teacher's mean tail.

Shape suffixes: N positions, V vocabulary, D hidden size, J feature columns, R bands of the vocabulary, K top-k slots, M
tail sample slots.

A position has tail mass r, the student's tail shape v, the teacher's mean tail g over the whole cache (its *profile*)
and tail samples û; v and g exclude the top-k ids and sum to 1. Outside the top-k the target is r · m / Σ m with

    m(i) = (1 − λ)·[(1 − a)·v(i) + a·g(i)] + λ·û(i),      with the a and λ of the band of id i.

a = λ = 0 is the bucket, λ = 1 the tail samples. v is exact where the student's tail has the teacher's shape, g where
all tails are alike, and û on average. Sums over the positions of an optimiser step tell which holds, using features φ
of the student's hidden states (the LM head's gradient is such a sum, over the hidden states themselves):

    S = Σ r(û − v)⊗φ      samples minus v: noise grows like √n, a wrong shape like n
    G = Σ r(g − v)⊗φ      profile minus v
    B = Σ r² ‖φ‖² Σ w²    the expected noise in ‖S‖², w the weights of the samples
    a = S·G / G·G, clamped to [0, 1];      K = max(0, ‖S − aG‖² − B);      λ = K / (K + B)

each over the ids of a band, as in James–Stein shrinkage. K grows like n² and B like n, so their decayed means over
steps give λ for the number of positions that the optimiser averages over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.shrinkage_stats import ShrinkageSums, TailView, bands

LEAST_MASS = 1e-6  # of the profile outside the top-k: below it, rounding determines the shape


@dataclass(frozen=True)
class TailWeights:
    """The current weights. By id: (1 − λ)(1 − a), (1 − λ)·a·g and λ, each [V]; by band: a and λ, each [R]."""

    own_V: Tensor
    profile_V: Tensor
    samples_V: Tensor
    profile_R: Tensor
    samples_R: Tensor


class Shrinkage:
    """The state of `shrink`: running statistics per band, and the sums of the current optimiser step.

    `profile_V`: the cache's tail profile, ≥ 0, sum 1, of which the first V ids are used; without one, a = 0 and bands
    are by id. `decay`: of the statistics, per step. `horizon`: the number of steps the optimiser averages over.
    `columns`: J, of which J − 1 are random projections of the hidden states (from `seed`) and one is constant. Weights
    change only in `finish_step`, so that they are independent of the noise of the step that uses them; until its first
    call the estimator is the bucket.
    Errors: `TargetError` if the profile is shorter than `vocab_size`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        profile_V: Tensor | None = None,
        decay: float = 0.9,
        horizon: float = 10.0,
        columns: int = 8,
        seed: int = 0,
    ) -> None:
        if profile_V is not None and len(profile_V) < vocab_size:
            raise TargetError(
                f"tail profile: {profile_V.numel()} values for a vocabulary of {vocab_size}: capture the cache again"
            )
        if profile_V is not None and len(profile_V) > vocab_size:  # the student has fewer ids
            profile_V = profile_V[:vocab_size] / profile_V[:vocab_size].sum()
        self.vocab_size = vocab_size
        self._decay, self._horizon, self._columns, self._seed = decay, horizon, columns, seed
        self._profile_V = None if profile_V is None else profile_V.float()
        self._band_V = bands(vocab_size, profile_V)
        self._bands = int(self._band_V.max()) + 1
        self._running_4R = torch.zeros(4, self._bands, dtype=torch.float64)
        self._counts_3 = torch.zeros(3, dtype=torch.float64)
        self._projection_DJ: Tensor | None = None
        self._sums: ShrinkageSums | None = None
        self.weights: TailWeights | None = None

    def to(self, device: torch.device) -> None:
        """Move the state to `device`; if that is another device, the current step's sums are discarded."""
        if self._band_V.device == device:
            return
        self._band_V, self._sums = self._band_V.to(device), None
        self._profile_V = None if self._profile_V is None else self._profile_V.to(device)
        self._running_4R, self._counts_3 = self._running_4R.to(device), self._counts_3.to(device)
        self._projection_DJ = None if self._projection_DJ is None else self._projection_DJ.to(device)
        self._set_weights()

    def features(self, hidden_ND: Tensor) -> Tensor:
        """φ: random projections of the hidden states and a constant 1, [N, J] float32. Their scale does not matter."""
        if self._projection_DJ is None:
            generator = torch.Generator().manual_seed(self._seed)
            shape = (hidden_ND.shape[1], self._columns - 1)
            self._projection_DJ = torch.randn(shape, generator=generator).to(hidden_ND.device)
        hidden_ND = hidden_ND.detach().float()
        return torch.cat([hidden_ND @ self._projection_DJ, torch.ones_like(hidden_ND[:, :1])], 1)

    def profile_outside_N(self, topk_ids_NK: Tensor, topk_valid_NK: Tensor) -> Tensor | None:
        """The profile's mass outside each top-k, 0 if below `LEAST_MASS`; None without a profile."""
        if self._profile_V is None:
            return None
        outside_N = 1.0 - torch.where(topk_valid_NK, self._profile_V[topk_ids_NK], 0.0).sum(-1)
        return torch.where(outside_N > LEAST_MASS, outside_N, 0.0)

    def observe(self, view: TailView, features_NJ: Tensor) -> None:
        """Add a chunk of positions to the step's sums."""
        if self._sums is None:
            self._sums = ShrinkageSums(len(self._band_V), features_NJ.shape[1], self._bands, features_NJ.device)
        self._sums.add(view, features_NJ, self._profile_V, self._band_V)

    def finish_step(self, sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Update the statistics with the step's sums and set the next step's weights. Call once per optimiser step.

        `sum_over_ranks` sums a float64 vector over all processes; each must call this, even without positions.
        """
        local_L = torch.zeros(4 * self._bands + 2, dtype=torch.float64, device=self._band_V.device)
        if self._sums is not None:
            local_L = self._sums.statistics(self._profile_V, self._band_V, self._bands)
        self._sums = None
        summed_L = sum_over_ranks(local_L)
        self._running_4R = self._decay * self._running_4R + summed_L[:-2].view(4, -1)
        self._counts_3 = self._decay * self._counts_3 + torch.cat([summed_L[-2:], torch.ones_like(summed_L[:1])])
        self._set_weights()

    def entry(self) -> dict[str, list[float]]:
        """The current weights per band, for the log: a as `tail_profile_weight`, λ as `tail_samples_weight`."""
        zeros_R = torch.zeros(self._bands)
        profile_R = zeros_R if self.weights is None else self.weights.profile_R
        samples_R = zeros_R if self.weights is None else self.weights.samples_R
        return {"tail_profile_weight": profile_R.tolist(), "tail_samples_weight": samples_R.tolist()}

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint, to be taken between optimiser steps."""
        return {"running_4R": self._running_4R.cpu(), "counts_3": self._counts_3.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore a checkpoint's state. Errors: `TargetError` if it was made for another vocabulary."""
        own = self.state()
        if {name: tensor.shape for name, tensor in state.items()} != {name: own[name].shape for name in own}:
            raise TargetError("tail statistics: the checkpoint was made for another vocabulary: choose another output")
        self._running_4R = state["running_4R"].to(self._running_4R)
        self._counts_3 = state["counts_3"].to(self._counts_3)
        self._set_weights()

    def _set_weights(self) -> None:
        cross_R, guided_R, excess_R, noise_R = self._running_4R
        squared, positions, steps = self._counts_3
        a_R = torch.where(guided_R > 0, cross_R / guided_R, 0.0).clamp(0.0, 1.0)
        coherent_R = (excess_R - 2 * a_R * cross_R + a_R**2 * guided_R).clamp(min=0.0) / squared
        averaged = self._horizon * positions / steps
        coherent_R, chance_R = coherent_R * averaged**2, noise_R / positions * averaged
        lambda_R = torch.where(coherent_R > 0, coherent_R / (coherent_R + chance_R), 0.0)
        self.weights = None
        if not bool((a_R > 0).any() | (lambda_R > 0).any()):
            return
        a_V, lambda_V = a_R.float()[self._band_V], lambda_R.float()[self._band_V]
        profile_V = torch.zeros_like(a_V) if self._profile_V is None else (1 - lambda_V) * a_V * self._profile_V
        self.weights = TailWeights((1 - lambda_V) * (1 - a_V), profile_V, lambda_V, a_R, lambda_R)
