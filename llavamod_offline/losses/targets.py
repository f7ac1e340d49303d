"""SparseTargets: a cached teacher's records in memory, independent of the format on disk.

Shape suffixes: N positions, K slots of the longest top-k, M slots of the longest list of tail samples, S stored
temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError

EMPTY_ID = -1
_LEAST_REST = 1e-6  # of a distribution that is nearly all on ids that are left out


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's truncated distributions at N positions; log-probs are natural, float32, at T = 1.

    `topk_ids_NK`, `topk_log_probs_NK`: the recorded top-k, most likely first; empty slots hold −1 and −inf.
    `tail_log_mass_N`: log of the probability outside the top-k, −inf without a tail.
    `tail_ids_NM`, `tail_weights_NM`: ids sampled from the tail, and the share of its mass that each represents (a row
    sums to 1, or to 0 without samples); empty slots hold −1 and 0.
    `target_ids_N`, `target_log_probs_N`: the actual token, its log-prob. `entropy_N`: of the full
    distribution, nats; this and the tail samples are those of the temperature `sampled_at`.
    `log_normalisers_NS`: log Σ_v p(v)^(1/T) for each T of `temperatures`. Ids are int32 or int64, < `vocab_size`.
    """

    topk_ids_NK: Tensor
    topk_log_probs_NK: Tensor
    tail_log_mass_N: Tensor
    tail_ids_NM: Tensor
    tail_weights_NM: Tensor
    target_ids_N: Tensor
    target_log_probs_N: Tensor
    entropy_N: Tensor
    log_normalisers_NS: Tensor
    temperatures: tuple[float, ...]
    vocab_size: int
    sampled_at: float = 1.0

    def __len__(self) -> int:
        return self.topk_ids_NK.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """Move every tensor to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseTargets:
        """Pin every tensor's memory, so that copies to a GPU can overlap with computation."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __getitem__(self, rows: slice) -> SparseTargets:
        """The positions of a slice."""
        return self._map(lambda tensor: tensor[rows])

    def take(self, rows_M: Tensor) -> SparseTargets:
        """The positions at `rows_M` (int64), in that order."""
        return self._map(lambda tensor: tensor.index_select(0, rows_M))

    def log_normaliser_N(self, temperature: float) -> Tensor:
        """log Σ p^(1/T) at `temperature`; 0 at T = 1. Errors: `TargetError` if it was not captured."""
        if temperature == 1.0:
            return torch.zeros_like(self.tail_log_mass_N)
        if temperature not in self.temperatures:
            raise TargetError(
                f"temperature {temperature:g} has no stored normaliser (stored: "
                f"{', '.join(f'{t:g}' for t in self.temperatures) or 'none'}): "
                f"capture the cache again with capture.temperature={temperature:g}, or with {temperature:g} in "
                "capture.temperatures to read tails as one bucket"
            )
        return self.log_normalisers_NS[:, self.temperatures.index(temperature)]

    def limited(self, vocab_size: int) -> SparseTargets:
        """The distributions over the first `vocab_size` ids only, for a student that has fewer ids than the teacher.

        The mass of the other ids is divided among the rest: exactly if they are in the top-k; for tail samples, by the
        share that these represent. Entropy and normalisers do not account for ids removed from the tail.
        """
        if vocab_size >= self.vocab_size:
            return self
        lost_NK = self.topk_ids_NK >= vocab_size
        lost_probs_NK = self.topk_log_probs_NK.exp() * lost_NK
        kept_NM = (self.tail_ids_NM < vocab_size).to(self.tail_weights_NM.dtype)
        kept_weights_NM = self.tail_weights_NM * kept_NM
        share_N = kept_weights_NM.sum(-1) + (self.tail_weights_NM.sum(-1) == 0)  # of the tail that is left
        tail_log_mass_N = self.tail_log_mass_N + share_N.log()
        lost_N = lost_probs_NK.sum(-1) + self.tail_log_mass_N.exp() - tail_log_mass_N.exp()
        left_N = (self.topk_log_probs_NK.exp() * ~lost_NK).sum(-1) + tail_log_mass_N.exp()
        # For a small number, the other one's rounding does not matter.
        log_rest_N = torch.where(lost_N < 0.5, 1 - lost_N, left_N).clamp(min=_LEAST_REST).log()
        own_NK = torch.where(lost_NK, 0.0, self.topk_log_probs_NK)
        surprise_N = -(lost_probs_NK * torch.where(lost_NK, self.topk_log_probs_NK, 0.0)).sum(-1)
        entropy_N = (self.entropy_N - surprise_N).clamp(min=0) / log_rest_N.exp() + log_rest_N
        normalisers = []
        for place, temperature in enumerate(self.temperatures):
            powers_N = (torch.where(lost_NK, self.topk_log_probs_NK, -torch.inf) / temperature).exp().sum(-1)
            rest_N = (self.log_normalisers_NS[:, place].exp() - powers_N).clamp(min=_LEAST_REST)
            normalisers.append(rest_N.log() - log_rest_N / temperature)
        order_NK = lost_NK.int().argsort(dim=-1, stable=True)  # what is left comes first, in order
        return replace(
            self,
            topk_ids_NK=self.topk_ids_NK.masked_fill(lost_NK, EMPTY_ID).gather(-1, order_NK),
            topk_log_probs_NK=(own_NK - log_rest_N[:, None]).masked_fill(lost_NK, -torch.inf).gather(-1, order_NK),
            tail_log_mass_N=tail_log_mass_N - log_rest_N,
            tail_ids_NM=self.tail_ids_NM.masked_fill(self.tail_ids_NM >= vocab_size, EMPTY_ID),
            tail_weights_NM=kept_weights_NM / share_N.clamp(min=_LEAST_REST)[:, None],
            target_log_probs_N=self.target_log_probs_N - log_rest_N,
            entropy_N=entropy_N.clamp(min=0),
            log_normalisers_NS=torch.stack(normalisers, -1) if normalisers else self.log_normalisers_NS,
            vocab_size=vocab_size,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseTargets:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        mapped: dict[str, Any] = {name: function(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **mapped)
