"""Remove empty parameters from a student for ZeRO-3, since DeepSpeed cannot gather them.

A sparse student without a residual expert has a shared expert of size 0, which the checkpoint format requires. It is
removed while an engine wraps the student, and its empty tensors are added again on export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def without_empty_experts(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Remove the shared experts of size 0 temporarily, without changing the output; yields their tensors by name."""
    taken: list[tuple[nn.Module, nn.Module]] = []
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        expert = getattr(module, "shared_expert", None)
        if isinstance(expert, nn.Module) and not any(parameter.numel() for parameter in expert.parameters()):
            taken.append((module, expert))
            tensors |= {f"{name}.shared_expert.{key}": value for key, value in expert.state_dict().items()}
    for block, _ in taken:
        block.shared_expert = _NoExpert()
    try:
        yield tensors
    finally:
        for block, expert in taken:
            block.shared_expert = expert


class _NoExpert(nn.Module):
    """An expert of size 0, which contributes nothing."""

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return torch.zeros_like(hidden_SD)
