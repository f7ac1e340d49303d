"""Noise on the routers of a sparse student in training, so that copies of one MLP get to see different tokens.

Normal noise is added to a router's logits before it chooses, as in Shazeer et al. (arXiv 1701.06538), in units of the
logits' own standard deviation in the batch. The balance loss and the reported figures use the logits without noise.
Evaluation and export have no noise.

Shape suffixes: S tokens in a row, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llavamod_offline.models.sparse_twins import is_router, rerouted, routed


def add_router_noise(model: nn.Module, noise: float) -> None:
    """Let routers choose by noisy logits in training. Call it before `limit_capacity` and `compare_single_choices`.

    Weights and configuration do not change, and a saved student carries no trace of it.
    """

    def choose(router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        if not router.training:
            return None
        logits_SE, weights_SK, _ = routed(output)
        noisy_SE = logits_SE + noise * logits_SE.detach().std() * torch.randn_like(logits_SE)
        # As in all known routers, the chosen experts' weights are a softmax over them alone.
        most_SK, choices_SK = noisy_SE.topk(weights_SK.shape[1], dim=-1)
        return rerouted(output, most_SK.float().softmax(-1).to(weights_SK.dtype), choices_SK)

    for module in model.modules():
        if is_router(module):
            module.register_forward_hook(choose)
