"""What ZeRO-3 asks of a student: no parameter without elements, which DeepSpeed's gather cannot handle.

A sparse student without a residual expert has a shared expert of size 0, as the checkpoint's format wants it. It is
taken out while the engine holds the student, and its empty tensors are put back into what is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@contextmanager
def without_empty_experts(model: LlavaForConditionalGeneration) -> Iterator[dict[str, Tensor]]:
    """Take the shared experts of size 0 out for a while; yields their tensors by name. The output stays the same."""
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
    """An expert of size 0: it adds nothing."""

    def forward(self, hidden_SD: Tensor) -> Tensor:
        return torch.zeros_like(hidden_SD)
