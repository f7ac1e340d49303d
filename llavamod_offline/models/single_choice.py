"""Routers that choose a single expert per token: in training they learn by comparing it with the runner-up.

With one choice the normalised weight is p / p: 1 whatever the router does, so the loss gives it no gradient. In
training the second most likely expert also runs, with a weight of 0: the output stays that of the first alone, as plain
transformers computes it from the checkpoint, and equals the dense model's at step 0. Only the gradient of the two
weights is that of p₁ / (p₁ + p₂) and p₂ / (p₁ + p₂), as with two choices (a straight-through estimator,
arXiv 1308.3432). A training step therefore costs as much as with two choices; inference runs one expert.

Weights of p / stop_gradient(p), or of p as in DeepSpeed's top-1 gate, also give a gradient, but one that only says
whether the chosen expert's output should be larger, not whether another is better: with Qwen's gated experts, routers
trained this way do worse than those that only the balance loss trains (on the toy problem of this module's tests).

Shape suffixes: S tokens in a row, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llavamod_offline.models.sparse_twins import always_normalises, is_router, rerouted, routed


def compare_single_choices(model: nn.Module) -> None:
    """Let routers with a single choice learn in training; other routers are left alone.

    Call it after `limit_capacity`: a dropped token's router learns nothing. Weights and configuration do not change,
    and a saved student carries no trace of it.
    """
    for router in model.modules():
        if is_router(router) and router.top_k == 1 and always_normalises(router):
            router.register_forward_hook(_add_runner_up)


def _add_runner_up(
    router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Extend one choice to two, the second of weight 0, where the router is trained."""
    if not (router.training and torch.is_grad_enabled() and router.weight.requires_grad):
        return None
    logits_SE, weights_S1, choices_S1 = routed(output)
    others_SE = logits_SE.detach().scatter(1, choices_S1, float("-inf"))
    choices_S2 = torch.cat([choices_S1, others_SE.argmax(-1, keepdim=True)], 1)
    shares_S2 = logits_SE.float().gather(1, choices_S2).softmax(-1)
    first_2 = (torch.arange(2, device=shares_S2.device) == 0).to(shares_S2)
    weights_S2 = weights_S1 * (first_2 + (shares_S2 - shares_S2.detach())).to(weights_S1.dtype)
    return rerouted(output, weights_S2, choices_S2)
