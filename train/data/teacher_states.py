"""The teacher's last hidden states at the positions of a micro-batch that a loss compares.

Shape suffixes: N positions of the batch, M those with a state, S sequences, T the teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.collate import Batch
from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import CacheError

if TYPE_CHECKING:
    from teacher_cache.read.reader import TeacherCache


@dataclass(frozen=True)
class WantedStates:
    """The states a loss compares: at `answers` (positions that predict a supervised token), at image tokens (by their
    id; None: none); `size` is their width."""

    size: int
    answers: bool
    image_token_id: int | None


@dataclass(frozen=True)
class TeacherStates:
    """`states_MT`, float32, and their positions in the batch: `rows_M`, ascending indices into its N."""

    rows_M: Tensor
    states_MT: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TeacherStates:
        """Move both tensors to `device`."""
        return TeacherStates(
            self.rows_M.to(device, non_blocking=non_blocking), self.states_MT.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> TeacherStates:
        """Pin both tensors, for overlapped copies to a GPU."""
        return TeacherStates(self.rows_M.pin_memory(), self.states_MT.pin_memory())


def image_positions(batch: Batch, image_token_id: int) -> Tensor:
    """Return which of the batch's positions are image tokens, [N] bool; for batches of all positions."""
    ids_N: Tensor = batch.input_ids_BT.flatten().index_select(0, batch.prediction_rows_N)
    return ids_N == image_token_id


def read_states(cache: TeacherCache, rows_S: NDArray[np.int64], batch: Batch, wanted: WantedStates) -> TeacherStates:
    """Read the states of a batch's sequences, by their rows in the cache, and keep the wanted ones.

    Errors: `CacheError` naming the samples if states are missing or have another size.
    """
    found = cache.hidden_states(rows_S)
    wanted_N = torch.zeros(len(batch.target_ids_N), dtype=torch.bool)
    if wanted.answers:
        wanted_N |= batch.target_ids_N != NO_TARGET
    if wanted.image_token_id is not None:
        wanted_N |= image_positions(batch, wanted.image_token_id)
    rows_M, states_MT = torch.from_numpy(found.rows_M), torch.from_numpy(found.states_MD)
    kept_M = wanted_N[rows_M]
    if int(kept_M.sum()) != int(wanted_N.sum()) or states_MT.shape[1] != wanted.size:
        named = ", ".join(dict.fromkeys(batch.keys))
        raise CacheError(
            f"cache '{cache.path}': samples {named}: {int(kept_M.sum())} hidden states of size {states_MT.shape[1]}, "
            f"expected {int(wanted_N.sum())} of size {wanted.size}: capture the whole set with the same settings"
        )
    return TeacherStates(rows_M[kept_M], states_MT[kept_M])
