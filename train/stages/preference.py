"""Preference distillation: the student learns which response to prefer, with the cached teacher as reference.

The loss of a step is the mean over its pairs of the preference loss + sft_weight · the chosen response's negative
log-prob + distill_weight · T² · its divergence from the teacher, the last two being means over the response's tokens
(as in RPO, arXiv 2404.19733); plus the routers' balance loss once.

With `kto` each pair is split into a desirable and an undesirable example; their common baseline, a KL, is estimated on
mismatched responses, without gradient.

Shape suffixes: B pairs of a micro-batch, R roles (chosen and rejected, or mismatched alone), S = R·B sequences, role
by role, N supervised positions, C of them in chosen responses, D hidden size. For the tower's features see
`student_pass.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llavamod_offline.losses.fused import LossTerms, sequence_log_probs_from_hidden
from llavamod_offline.losses.kinds import PreferenceKind
from llavamod_offline.losses.preference import PreferenceTerms, kto_loss, preference_loss
from llavamod_offline.models.forward import lm_head_weight
from llavamod_offline.models.routing import Routing
from train.data.batches import TrainBatch
from train.engine.deepspeed_engine import World
from train.stages.loss_sums import LossSums
from train.stages.student_pass import Distillation, TowerAhead, predicting_states, tower_features, with_balance

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    Loss = Callable[[LlavaForConditionalGeneration, TrainBatch, Tensor | None, Tensor | None], LossSums]
    LogRatios = Callable[[LlavaForConditionalGeneration, TrainBatch], TowerAhead]

Kind = PreferenceKind | Literal["kto"]


def make_loss(
    *,
    kind: Kind,
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
    average_log_probs: bool,
    sft_weight: float,
    distill_weight: float,
    distillation: Distillation,
    vocab_size: int,
    router_aux_coef: float,
    train_vision: bool,
) -> Loss:
    """Return the loss of a micro-batch, summed over its pairs.

    The loss takes mean log-ratios over the global batch, or None if the micro-batch is the whole batch: for `kto_pair`
    those of chosen and rejected responses [2], for `kto` that of mismatched ones [1]. It also takes the tower's
    features if the ratios needed them, so that a step runs the tower once per image.
    """

    def loss(
        model: LlavaForConditionalGeneration,
        batch: TrainBatch,
        mean_ratios_R: Tensor | None,
        features_IPC: Tensor | None,
    ) -> LossSums:
        if features_IPC is None:
            features_IPC = tower_features(model, batch, train_vision=train_vision)
        found = _log_probs(model, batch, vocab_size, average_log_probs, features_IPC, train_vision)
        policy_2B, reference_2B = found.policy_RB, found.reference_RB
        means: dict[str, Tensor] = {}
        if kind == "kto":
            ratios_R = mean_ratios_R
            if ratios_R is None:
                assert batch.mismatched is not None
                ratios_R = _log_ratios(model, batch.mismatched, vocab_size, average_log_probs, features_IPC).mean(1)
            result, kl = _unpaired(policy_2B, reference_2B, ratios_R, beta, (desirable_weight, undesirable_weight))
            means["kl"] = kl * batch.samples
        else:
            result = preference_loss(
                policy_2B[0],
                policy_2B[1],
                reference_2B[0],
                reference_2B[1],
                kind=kind,
                beta=beta,
                label_smoothing=label_smoothing,
                kl_chosen=None if mean_ratios_R is None else mean_ratios_R[0],
                kl_rejected=None if mean_ratios_R is None else mean_ratios_R[1],
            )
        total = result.loss_sum
        means |= {
            "preference": result.loss_sum.detach(),
            "reward_accuracy": result.correct_B.float().sum(),
            "reward_margin": result.margins_B.sum(),
            "chosen_log_prob": policy_2B[0].detach().sum(),
            "rejected_log_prob": policy_2B[1].detach().sum(),
        }
        if sft_weight:
            nll = -found.chosen_mean_B.sum()
            total = total + sft_weight * nll
            means["chosen_nll"] = nll.detach()
        if distill_weight:
            terms = _distilled(model, batch, found, distillation)
            total = total + distill_weight * terms.loss_sum
            means |= {"divergence": terms.divergence_sum, **terms.metrics}
        spreads = {"chosen_reward": result.chosen_rewards_B, "rejected_reward": result.rejected_rewards_B}
        sums = LossSums(total, means=means, spreads=spreads)
        return with_balance(sums, found.routing, coefficient=router_aux_coef)

    return loss


def make_log_ratios(*, average_log_probs: bool, vocab_size: int, mismatched: bool, train_vision: bool) -> LogRatios:
    """Return a look-ahead: log-ratios [R, B] of policy and reference, without gradient, and the tower's features.

    The ratios are those of the trained responses, or only of the `mismatched` ones.
    """

    def log_ratios(model: LlavaForConditionalGeneration, batch: TrainBatch) -> TowerAhead:
        wanted = batch.mismatched if mismatched else batch
        assert wanted is not None
        features_IPC = tower_features(model, wanted, train_vision=train_vision)
        return TowerAhead(_log_ratios(model, wanted, vocab_size, average_log_probs, features_IPC), features_IPC)

    return log_ratios


def mean_log_ratios(ratios: Sequence[Tensor], world: World) -> Tensor:
    """Average log-ratios [R, B] over all micro-batches and processes to [R], from which KTO estimates its KL."""
    totals_R = torch.stack([ratios_RB.double().sum(1) for ratios_RB in ratios]).sum(0)
    count = totals_R.new_tensor([sum(ratios_RB.shape[1] for ratios_RB in ratios)])
    summed = world.sum(torch.cat([totals_R, count]))
    return (summed[:-1] / summed[-1]).float()


def _unpaired(
    policy_2B: Tensor, reference_2B: Tensor, mean_ratio_1: Tensor, beta: float, weights: tuple[float, float]
) -> tuple[PreferenceTerms, Tensor]:
    """Apply KTO to each response separately; returns each pair's terms, its loss the mean of both, and the KL."""
    desirable_2B = torch.ones_like(policy_2B, dtype=torch.bool)
    desirable_2B[1] = False
    result = kto_loss(
        policy_2B.flatten(),
        reference_2B.flatten(),
        desirable_2B.flatten(),
        mismatched_ratios_M=mean_ratio_1,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    rewards_2B = result.rewards_S.view_as(policy_2B)
    return PreferenceTerms(result.losses_S.view_as(policy_2B).mean(0), rewards_2B[0], rewards_2B[1]), result.kl


@dataclass(frozen=True)
class _LogProbs:
    """Log-probs of each role's responses, and their inputs; `chosen_mean_B` belongs to the first role."""

    policy_RB: Tensor
    reference_RB: Tensor
    chosen_mean_B: Tensor
    lengths_S: Tensor
    hidden_ND: Tensor
    routing: Routing


@torch.no_grad()
def _log_ratios(
    model: LlavaForConditionalGeneration,
    batch: TrainBatch,
    vocab_size: int,
    average: bool,
    features_IPC: Tensor | None,
) -> Tensor:
    found = _log_probs(model, batch, vocab_size, average, features_IPC, False)
    return found.policy_RB - found.reference_RB


def _log_probs(
    model: LlavaForConditionalGeneration,
    batch: TrainBatch,
    vocab_size: int,
    average: bool,
    features_IPC: Tensor | None,
    train_vision: bool,
) -> _LogProbs:
    assert batch.reference_S is not None
    inputs = batch.batch
    hidden_ND, routing = predicting_states(model, batch, train_vision=train_vision, features_IPC=features_IPC)
    policy_S = sequence_log_probs_from_hidden(
        hidden_ND, lm_head_weight(model), inputs.target_ids_N, inputs.sequence_of_N, len(inputs), vocab_size=vocab_size
    )
    lengths_S = torch.bincount(inputs.sequence_of_N, minlength=len(inputs))
    means_S = policy_S / lengths_S
    reference_S = batch.reference_S
    if average:
        policy_S, reference_S = means_S, reference_S / lengths_S
    chosen_mean_B = means_S[: batch.samples]
    shape = (-1, batch.samples)
    return _LogProbs(policy_S.view(shape), reference_S.view(shape), chosen_mean_B, lengths_S, hidden_ND, routing)


def _distilled(
    model: LlavaForConditionalGeneration, batch: TrainBatch, found: _LogProbs, distillation: Distillation
) -> LossTerms:
    """Compute the divergence on chosen responses, a mean over each one's tokens; metrics likewise."""
    assert batch.targets is not None
    chosen_C = slice(len(batch.targets))
    weights_C = 1.0 / found.lengths_S[batch.batch.sequence_of_N[chosen_C]]
    return distillation(found.hidden_ND[chosen_C], lm_head_weight(model), batch.targets, weights_N=weights_C)
