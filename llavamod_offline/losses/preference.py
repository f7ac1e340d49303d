"""Preference losses on sequence log-probs, with the teacher as the reference.

Shape suffixes: B pairs. With r = log-prob of a response under the policy − under the reference (w chosen, l rejected),
β, and label smoothing ε:

- `sigmoid`: −(1 − ε) log σ(β(r_w − r_l)) − ε log σ(−β(r_w − r_l))             (DPO, arXiv 2305.18290; ε: cDPO)
- `ipo`: ((r_w − r_l) − 1/(2β))²                                               (IPO, arXiv 2310.12036)
- `hinge`: max(0, 1 − β(r_w − r_l))                                            (SLiC-HF, arXiv 2305.10425)
- `kto_pair`: the mean of 1 − σ(β(r_w − K_l)) and 1 − σ(β(K_w − r_l)), with K = max(0, mean r) of each side over the
  batch, detached                                                              (KTO, arXiv 2402.01306, on pairs)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llavamod_offline.errors import ConfigError
from llavamod_offline.losses.kinds import PREFERENCE_KINDS, PreferenceKind


@dataclass(frozen=True)
class PreferenceTerms:
    """The losses of B pairs (differentiable), and the rewards β·r of their responses (detached)."""

    losses_B: Tensor
    chosen_rewards_B: Tensor
    rejected_rewards_B: Tensor

    @property
    def margins_B(self) -> Tensor:
        """β(r_w − r_l): how much more strongly than the reference the policy prefers the chosen response."""
        return self.chosen_rewards_B - self.rejected_rewards_B

    @property
    def correct_B(self) -> Tensor:
        """The pairs with a positive margin, bool; their mean is the accuracy."""
        return self.margins_B > 0

    @property
    def loss_sum(self) -> Tensor:
        """The sum over pairs; 0 for none."""
        return self.losses_B.sum()


def preference_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    kind: PreferenceKind,
    beta: float,
    label_smoothing: float = 0.0,
    kl_chosen: Tensor | None = None,
    kl_rejected: Tensor | None = None,
) -> PreferenceTerms:
    """The preference loss of each pair, from log-probs (sums or means) in nats, computed in float32.

    Shapes: all tensors [B] float; references are detached. `kl_chosen`, `kl_rejected` (scalars, for `kto_pair`): mean
    log-ratios r over the global batch, clamped at 0 and detached here; by default those of the given pairs.
    Errors: `ConfigError` for an unknown kind, β ≤ 0, or label smoothing with a kind other than `sigmoid`.
    Source: the papers named above.
    """
    _check(kind, beta, label_smoothing)
    chosen_B = policy_chosen_B.float() - reference_chosen_B.detach().float()
    rejected_B = policy_rejected_B.float() - reference_rejected_B.detach().float()
    logits_B = beta * (chosen_B - rejected_B)
    if kind == "sigmoid":
        losses_B = -(1 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)
    elif kind == "ipo":
        losses_B = (chosen_B - rejected_B - 1 / (2 * beta)) ** 2
    elif kind == "hinge":
        losses_B = torch.relu(1 - logits_B)
    else:
        kl_w, kl_l = _anchor(chosen_B, kl_chosen), _anchor(rejected_B, kl_rejected)
        # 1 − σ(x) = σ(−x)
        losses_B = (torch.sigmoid(-beta * (chosen_B - kl_l)) + torch.sigmoid(-beta * (kl_w - rejected_B))) / 2
    return PreferenceTerms(losses_B, beta * chosen_B.detach(), beta * rejected_B.detach())


def _anchor(log_ratios_B: Tensor, given: Tensor | None) -> Tensor:
    """K: the estimated KL of policy and reference, max(0, mean r), detached; 0 for an empty batch."""
    if given is not None:
        return given.detach().float().clamp(min=0.0)
    if not len(log_ratios_B):
        return log_ratios_B.new_zeros(())
    return log_ratios_B.detach().mean().clamp(min=0.0)


def _check(kind: str, beta: float, label_smoothing: float) -> None:
    if kind not in PREFERENCE_KINDS:
        raise ConfigError(f"preference loss '{kind}' is unknown: choose one of {', '.join(PREFERENCE_KINDS)}")
    if beta <= 0:
        raise ConfigError(f"preference loss: beta is {beta:g}: expected a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"preference loss: label_smoothing is {label_smoothing:g}: expected 0 ≤ label_smoothing < 0.5"
        )
    if label_smoothing and kind != "sigmoid":
        raise ConfigError(
            f"preference loss '{kind}' has no label smoothing: set label_smoothing to 0, or use 'sigmoid'"
        )
