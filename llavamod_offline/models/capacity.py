"""Expert capacity: in training, an expert accepts a limited number of tokens and drops the rest.

With E experts, K choices per token and n non-padding tokens, each expert accepts ⌈factor · K · n / E⌉ tokens. Tokens
are accepted in batch order, all first choices before all second choices. A token dropped by one expert gives that
weight to the experts it keeps; a token dropped by all passes through the residual stream only (and the shared expert,
if any). Nothing is dropped in evaluation. Source: GShard (arXiv 2006.16668), as in DeepSpeed's top-2 gate, but without
noise in the second choice and without counting padding.

Shape suffixes: B sequences, T tokens, S = B·T tokens in a row, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llavamod_offline.models.sparse_twins import is_router, rerouted, routed


def limit_capacity(model: Any, factor: float) -> None:
    """Make a sparse student's routers drop tokens beyond their experts' capacity in training mode.

    Weights and configuration do not change, and a saved student carries no trace of it. The recomputation of gradient
    checkpointing drops the same tokens if it runs before the next forward pass. No-op for dense models.
    """
    mask = _Mask()
    routers = [module for module in model.modules() if is_router(module)]
    if routers:
        model.get_decoder().register_forward_pre_hook(mask.keep, with_kwargs=True)
    for router in routers:
        router.register_forward_hook(_drop(mask, factor))


def places(choices_SK: Tensor, keep_S: Tensor, experts: int, capacity: int | Tensor) -> Tensor:
    """Which choices are within capacity, [S, K] bool. Tokens outside `keep_S` take no capacity and are not dropped."""
    found = []
    every_E = torch.arange(experts, device=choices_SK.device)
    taken_E = torch.zeros_like(every_E)
    for choice in range(choices_SK.shape[1]):
        queued_SE = ((choices_SK[:, choice, None] == every_E) & keep_S[:, None]).long()
        ahead_SE = queued_SE.cumsum(0) - queued_SE + taken_E
        found.append(ahead_SE.gather(1, choices_SK[:, choice, None])[:, 0] < capacity)
        taken_E = taken_E + queued_SE.sum(0)
    return torch.stack(found, 1) | ~keep_S[:, None]


class _Mask:
    """The padding mask of the latest forward pass, which routers do not receive."""

    def __init__(self, keep_S: Tensor | None = None) -> None:
        self.keep_S = keep_S

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the attention mask passed to the language model."""
        mask_BT = kwargs.get("attention_mask")
        self.keep_S = None if mask_BT is None else mask_BT.reshape(-1).to(torch.bool)


def _drop(mask: _Mask, factor: float) -> Any:
    def drop(
        router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not router.training:
            return None
        logits_SE, weights_SK, choices_SK = routed(output)
        keep_S = mask.keep_S
        if keep_S is None:
            keep_S = torch.ones(len(choices_SK), dtype=torch.bool, device=choices_SK.device)
        experts = logits_SE.shape[1]
        # Kept as a tensor: reading its value would wait for the device in every layer.
        capacity = (factor * choices_SK.shape[1] * keep_S.sum().double() / experts).ceil()
        kept_SK = weights_SK * places(choices_SK, keep_S, experts, capacity)
        total_S1 = kept_SK.sum(-1, keepdim=True)
        # A token dropped by every expert has zero weights and a zero gradient.
        scale_S1 = weights_SK.sum(-1, keepdim=True) / torch.where(total_S1 > 0, total_S1, 1.0)
        return rerouted(output, kept_SK * scale_S1, choices_SK)

    return drop
