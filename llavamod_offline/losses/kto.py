"""KTO on single responses, each marked desirable or not, with the teacher as the reference.

Shape suffixes: S responses, M mismatched responses. With r = log-prob of a response under the policy − under the
reference, weights w, and K = max(0, mean r over *mismatched* responses, i.e. answers to other prompts), detached:

- desirable: w₊ · (1 − σ(β(r − K)))
- undesirable: w₋ · (1 − σ(β(K − r)))

K estimates the KL of policy and reference. The training responses would bias it, since the policy is trained on them;
`kto_pair` (see `preference.py`) uses them nevertheless. Source: KTO, arXiv 2402.01306.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavamod_offline.errors import ConfigError, TargetError


@dataclass(frozen=True)
class KtoLoss:
    """The losses of S responses (differentiable), their rewards β·r (detached), which are desirable, and K."""

    losses_S: Tensor
    rewards_S: Tensor
    desirable_S: Tensor
    kl: Tensor

    @property
    def loss_sum(self) -> Tensor:
        """The sum over responses; 0 for none."""
        return self.losses_S.sum()


def kto_loss(
    policy_S: Tensor,
    reference_S: Tensor,
    desirable_S: Tensor,
    *,
    mismatched_ratios_M: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KtoLoss:
    """The KTO loss of each response, from log-probs (sums or means) in nats, computed in float32.

    Shapes: `policy_S`, `reference_S` [S] float, `desirable_S` [S] bool; `mismatched_ratios_M` [M] are the log-ratios r
    of the mismatched responses of the global batch (or their mean, [1]), detached and clamped here.
    Errors: `ConfigError` for β ≤ 0 or a negative weight; `TargetError` for responses without a mismatched one.
    Source: KTO, arXiv 2402.01306.
    """
    if not beta > 0:
        raise ConfigError(f"kto: beta is {beta:g}: expected a number above 0")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not weight >= 0:
            raise ConfigError(f"kto: {name} is {weight:g}: expected a number ≥ 0")
    if not mismatched_ratios_M.numel() and len(policy_S):
        raise TargetError("kto: mismatched_ratios_M is empty: pass the mismatched responses of the global batch")
    ratios_S = policy_S.float() - reference_S.detach().float()
    kl = ratios_S.new_zeros(())
    if mismatched_ratios_M.numel():
        kl = mismatched_ratios_M.detach().float().mean().clamp(min=0.0)
    desirable_S = desirable_S.bool()
    # 1 − σ(x) = σ(−x)
    sign_S = torch.where(desirable_S, -1.0, 1.0)
    weight_S = torch.where(desirable_S, desirable_weight, undesirable_weight)
    losses_S = weight_S * torch.sigmoid(sign_S * beta * (ratios_S - kl))
    return KtoLoss(losses_S, beta * ratios_S.detach(), desirable_S, kl)
