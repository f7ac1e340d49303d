"""AlignedTargets: a teacher's records at spans of tokens that a student with another tokenizer shares with it.

Shape suffixes: S spans, K slots of matched ids, U slots of unmatched ones, P tokens before the spans' last ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class AlignedTargets:
    """What a teacher's record says about the last token of each span; log-probs are natural, float32, at T = 1.

    By the chain rule, a log-prob is the token's, given the span's earlier tokens, plus theirs, `path_log_probs_S`.

    `rows_S`: the position, among the student's, of a span's last token. `rows_P`, `spans_P`: the positions of
    its earlier tokens, and their span. `topk_ids_SK`, `topk_log_probs_SK`: the student's ids that stand for the same
    bytes as a token of the teacher's top-k, and the teacher's log-probs; empty slots hold −1 and −inf.
    `unmatched_log_probs_SU`: of the other tokens of its top-k, most likely first; −inf in empty slots.
    `tail_log_mass_S`: of all others. `is_single_S`: whether the span is one token on each side.
    """

    rows_S: Tensor
    rows_P: Tensor
    spans_P: Tensor
    topk_ids_SK: Tensor
    topk_log_probs_SK: Tensor
    unmatched_log_probs_SU: Tensor
    tail_log_mass_S: Tensor
    path_log_probs_S: Tensor
    is_single_S: Tensor

    def __len__(self) -> int:
        return len(self.rows_S)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> AlignedTargets:
        """Move every tensor to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AlignedTargets:
        """Pin every tensor's memory, so that copies to a GPU can overlap with computation."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __getitem__(self, spans: slice) -> AlignedTargets:
        """The last tokens of some spans; their earlier tokens are left out."""
        none = slice(0, 0)
        own = {field.name: getattr(self, field.name)[spans] for field in fields(self) if not field.name.endswith("_P")}
        return AlignedTargets(**own, rows_P=self.rows_P[none], spans_P=self.spans_P[none])

    def _map(self, function: Callable[[Tensor], Tensor]) -> AlignedTargets:
        return AlignedTargets(**{field.name: function(getattr(self, field.name)) for field in fields(self)})
