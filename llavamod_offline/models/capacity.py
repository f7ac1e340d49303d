"""Capacity: in training an expert takes a limited number of tokens; what comes later loses that expert.

A layer of E experts, K choices a token and n tokens that are no padding gives each expert ⌈factor · K · n / E⌉ places.
Tokens queue in their order in the batch, all first choices before all second ones. A token that loses an expert gives
its weight to the experts it keeps; one that loses all has the residual stream alone (and the shared expert, if any).
Source: GShard (arXiv 2006.16668) as DeepSpeed's top-2 gate does it, but without noise in the second choice, and with
padding outside of the count. Evaluation never drops.

Shape suffixes: B sequences, T tokens, S = B·T tokens in a row, E experts, K choices a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llavamod_offline.models.routing import ROUTERS


def limit_capacity(model: LlavaForConditionalGeneration, factor: float) -> None:
    """Let the routers of a sparse student drop what goes beyond their experts' capacity, while it is in training mode.

    The weights and the configuration stay as they are: a saved student knows nothing of it. Gradient checkpointing's
    second pass drops the same tokens, as long as it comes before the next forward pass. A dense model is left alone.
    """
    mask = _Mask()
    routers = [module for module in model.modules() if isinstance(module, ROUTERS)]
    if routers:
        model.model.language_model.register_forward_pre_hook(mask.keep, with_kwargs=True)
    for router in routers:
        router.register_forward_hook(_drop(mask, factor))


def places(choices_SK: Tensor, keep_S: Tensor, experts: int, capacity: int) -> Tensor:
    """Which choices find a place, [S, K] bool; a token that `keep_S` leaves out takes none and loses none."""
    found = []
    taken_E = torch.zeros(experts, dtype=torch.long, device=choices_SK.device)
    for choice in range(choices_SK.shape[1]):
        queued_SE = nn.functional.one_hot(choices_SK[:, choice], experts) * keep_S[:, None]
        ahead_SE = queued_SE.cumsum(0) - queued_SE + taken_E
        found.append(ahead_SE.gather(1, choices_SK[:, choice, None])[:, 0] < capacity)
        taken_E = taken_E + queued_SE.sum(0)
    return torch.stack(found, 1) | ~keep_S[:, None]


class _Mask:
    """The padding of the latest forward pass, which the routers themselves do not see."""

    def __init__(self) -> None:
        self.keep_S: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the attention mask that the language model is called with."""
        mask_BT = kwargs.get("attention_mask")
        self.keep_S = None if mask_BT is None else mask_BT.reshape(-1).to(torch.bool)


def _drop(mask: _Mask, factor: float) -> Any:
    def drop(
        router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not router.training:
            return None
        logits_SE, weights_SK, choices_SK = output
        keep_S = mask.keep_S
        if keep_S is None:
            keep_S = torch.ones(len(choices_SK), dtype=torch.bool, device=choices_SK.device)
        experts = logits_SE.shape[1]
        capacity = math.ceil(factor * choices_SK.shape[1] * int(keep_S.sum()) / experts)
        kept_SK = weights_SK * places(choices_SK, keep_S, experts, capacity)
        total_S1 = kept_SK.sum(-1, keepdim=True)
        # A token without any place has weights of zero, and a gradient of zero.
        scale_S1 = weights_SK.sum(-1, keepdim=True) / torch.where(total_S1 > 0, total_S1, 1.0)
        return logits_SE, kept_SK * scale_S1, choices_SK

    return drop
