"""KTO on single responses, each marked desirable or not, with the teacher's log-probs as the reference.

Shape suffixes: S responses, M mismatched ones. With r = policy's − reference's log-prob of a response, weights w, and
K = max(0, mean r over *mismatched* responses, answers that belong to other prompts), without gradient:

- desirable: w₊ · (1 − σ(β(r − K)))
- undesirable: w₋ · (1 − σ(β(K − r)))

K stands for the KL of policy and reference. The responses that are trained on cannot spec it, since it is they that
the policy is moved by; `kto_pair` (see `preference.py`) does so all the same. Source: KTO, arXiv 2402.01306.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavamod_offline.errors import ConfigError, TargetError


@dataclass(frozen=True)
class KtoLoss:
    """The losses of S responses (with gradient), their detached rewards β·r, which are desirable, and K."""

    losses_S: Tensor
    rewards_S: Tensor
    desirable_S: Tensor
    kl: Tensor

    @property
    def loss_sum(self) -> Tensor:
        """The sum over responses; 0 for none."""
        return self.losses_S.sum()

    @property
    def desirable_rewards(self) -> Tensor:
        """The rewards of the desirable responses; how far they lie above those of the others is the margin."""
        return self.rewards_S[self.desirable_S]

    @property
    def undesirable_rewards(self) -> Tensor:
        """The rewards of the undesirable responses."""
        return self.rewards_S[~self.desirable_S]


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

    Shapes: `policy_S`, `reference_S` float, `desirable_S` bool; `mismatched_ratios_M` are log-ratios r of mismatched
    responses over the whole global batch (or their mean alone, [1]), detached and clamped here.
    Errors: `ConfigError` for β ≤ 0 or a negative weight; `TargetError` if there are responses but no mismatched one.
    """
    if not beta > 0:
        raise ConfigError(f"kto: beta is {beta:g}, expected a number above 0")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not weight >= 0:
            raise ConfigError(f"kto: {name} is {weight:g}, expected a number not below 0")
    if not mismatched_ratios_M.numel() and len(policy_S):
        raise TargetError("kto: no mismatched response to spec the KL by: give those of the whole global batch")
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
