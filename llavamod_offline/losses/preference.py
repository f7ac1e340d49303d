"""Preference losses on sequence log-probs, with the teacher as the reference.

Shape suffixes: B pairs, S single responses, M mismatched ones. With r = log-prob of a response under the policy − under
the reference (w chosen, l rejected), β, and label smoothing ε:

- `sigmoid`: −(1 − ε) log σ(β(r_w − r_l)) − ε log σ(−β(r_w − r_l))             (DPO, arXiv 2305.18290; ε: cDPO)
- `ipo`: ((r_w − r_l) − 1/(2β))²; with log-probs averaged over tokens, as its authors and TRL use it, 1/(2β) means the
  same for responses of any length                                             (IPO, arXiv 2310.12036)
- `hinge`: max(0, 1 − β(r_w − r_l))                                            (SLiC-HF, arXiv 2305.10425)
- `kto_pair`: the mean of 1 − σ(β(r_w − K_l)) and 1 − σ(β(K_w − r_l)), with K = max(0, mean r) of each side over the
  batch, detached                                                              (KTO, arXiv 2402.01306, on pairs)

`kto_loss` takes S single responses instead, with weights w₊ and w₋ and K = max(0, mean r over M *mismatched* responses,
i.e. answers to other prompts), detached:

- desirable: w₊ · (1 − σ(β(r − K)))
- undesirable: w₋ · (1 − σ(β(K − r)))

K estimates the KL of policy and reference. The training responses would bias it, because the policy is trained on them;
`kto_pair` uses them nevertheless. Source: KTO, arXiv 2402.01306.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llavamod_offline.errors import ConfigError, TargetError
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
