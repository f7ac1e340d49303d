"""SparseTargets: the one in-memory form of a cached teacher; the losses know nothing of the disk format.

Shape suffixes: N positions, K slots of the longest head, M slots of the longest list of tail draws, S stored
temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError

EMPTY_ID = -1


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distributions at N positions, truncated faithfully; all log-probs are natural, float32, at T = 1.

    `topk_ids_NK`, `topk_log_probs_NK`: the head, most likely first; an empty slot holds −1 and −inf.
    `tail_log_mass_N`: log of the probability outside the head, −inf where there is no tail.
    `tail_ids_NM`, `tail_weights_NM`: ids drawn from the tail and the share of the tail's mass each stands for (a row
    sums to 1, or to 0 where nothing was drawn); an empty slot holds −1 and 0.
    `target_ids_N`, `target_log_probs_N`: the actual token and its log-prob. `entropy_N`: of the full one, nats.
    `log_normalisers_NS`: log Σ_v p(v)^(1/T) for each of `temperatures`. Ids, of 32 or 64 bits, are < `vocab_size`.
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

    def __len__(self) -> int:
        return self.topk_ids_NK.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """Move every tensor to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SparseTargets:
        """Pin every tensor, for overlapped copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __getitem__(self, rows: slice) -> SparseTargets:
        """A slice of the positions."""
        return self._map(lambda tensor: tensor[rows])

    def take(self, rows_M: Tensor) -> SparseTargets:
        """Some of the positions, by their rows (int64) in any order."""
        return self._map(lambda tensor: tensor.index_select(0, rows_M))

    def log_normaliser_N(self, temperature: float) -> Tensor:
        """log Σ p^(1/T) at `temperature`; 0 at T = 1. Errors: `TargetError` if it was not captured."""
        if temperature == 1.0:
            return torch.zeros_like(self.tail_log_mass_N)
        if temperature not in self.temperatures:
            raise TargetError(
                f"temperature {temperature:g} has no stored normaliser (stored: "
                f"{', '.join(f'{t:g}' for t in self.temperatures) or 'none'}): "
                f"capture the cache again with {temperature:g} in capture.temperatures"
            )
        return self.log_normalisers_NS[:, self.temperatures.index(temperature)]

    def _map(self, function: object) -> SparseTargets:
        assert callable(function)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return SparseTargets(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})
