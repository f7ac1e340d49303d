"""Preference distillation: the student learns which response to prefer, the cached teacher being the reference.

The loss of a step is the mean over its pairs of the preference loss + sft_weight · the chosen response's negative
log-prob + distill_weight · T² · its divergence from the teacher, the last two being means over the response's tokens
(as in RPO, arXiv 2404.19733), plus the routers' balance loss once.

Letters: B pairs of a micro-batch, S = 2·B sequences, the chosen ones before the rejected ones, N supervised positions,
C of them in chosen responses, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llavamod_offline.losses.fused import LossTerms, sequence_log_probs_from_hidden
from llavamod_offline.losses.preference import PreferenceKind, preference_loss
from llavamod_offline.models.forward import head_weight
from llavamod_offline.models.routing import Routing
from train.batches import TrainBatch
from train.engine import World
from train.stages.student_pass import Distillation, predicting_states, with_balance
from train.sums import LossSums

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    Loss = Callable[[LlavaForConditionalGeneration, TrainBatch, Tensor | None], LossSums]
    LogRatios = Callable[[LlavaForConditionalGeneration, TrainBatch], Tensor]


def make_loss(
    *,
    kind: PreferenceKind,
    beta: float,
    label_smoothing: float,
    average_log_probs: bool,
    sft_weight: float,
    distill_weight: float,
    distillation: Distillation,
    vocab_size: int,
    router_aux_coef: float,
    train_vision: bool,
) -> Loss:
    """The loss of a micro-batch, summed over its pairs.

    It takes, for `kto_pair`, the mean log-ratios [2] of the chosen and the rejected responses over the global batch.
    """

    def loss(model: LlavaForConditionalGeneration, batch: TrainBatch, mean_ratios_2: Tensor | None) -> LossSums:
        found = _log_probs(model, batch, vocab_size, average_log_probs, train_vision)
        policy_2B, reference_2B = found.policy_2B, found.reference_2B
        result = preference_loss(
            policy_2B[0],
            policy_2B[1],
            reference_2B[0],
            reference_2B[1],
            kind=kind,
            beta=beta,
            label_smoothing=label_smoothing,
            kl_chosen=None if mean_ratios_2 is None else mean_ratios_2[0],
            kl_rejected=None if mean_ratios_2 is None else mean_ratios_2[1],
        )
        total = result.loss_sum
        means = {
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
        return with_balance(sums, found.routing, coefficient=router_aux_coef, count=batch.samples)

    return loss


def make_log_ratios(*, average_log_probs: bool, vocab_size: int) -> LogRatios:
    """The log-ratios [2, B] of policy and reference of a micro-batch, without gradient."""

    def log_ratios(model: LlavaForConditionalGeneration, batch: TrainBatch) -> Tensor:
        with torch.no_grad():
            found = _log_probs(model, batch, vocab_size, average_log_probs, False)
            return found.policy_2B - found.reference_2B

    return log_ratios


def mean_log_ratios(ratios: Sequence[Tensor], world: World) -> Tensor:
    """The mean log-ratios [2] over all micro-batches [2, B] of all processes: what `kto_pair` measures its KL by."""
    totals_2 = torch.stack([ratios_2B.double().sum(1) for ratios_2B in ratios]).sum(0)
    count = totals_2.new_tensor([sum(ratios_2B.shape[1] for ratios_2B in ratios)])
    summed = world.sum(torch.cat([totals_2, count]))
    return (summed[:2] / summed[2]).float()


@dataclass(frozen=True)
class _LogProbs:
    """Log-probs of the chosen (0) and the rejected (1) responses, and what they were made from."""

    policy_2B: Tensor
    reference_2B: Tensor
    chosen_mean_B: Tensor
    lengths_S: Tensor
    hidden_ND: Tensor
    routing: Routing


def _log_probs(
    model: LlavaForConditionalGeneration, batch: TrainBatch, vocab_size: int, average: bool, train_vision: bool
) -> _LogProbs:
    assert batch.reference_S is not None
    inputs = batch.batch
    hidden_ND, routing = predicting_states(model, batch, train_vision=train_vision)
    policy_S = sequence_log_probs_from_hidden(
        hidden_ND, head_weight(model), inputs.target_ids_N, inputs.sequence_of_N, len(inputs), vocab_size=vocab_size
    )
    lengths_S = torch.bincount(inputs.sequence_of_N, minlength=len(inputs))
    means_S = policy_S / lengths_S
    reference_S = batch.reference_S
    if average:
        policy_S, reference_S = means_S, reference_S / lengths_S
    chosen_mean_B = means_S[: batch.samples]
    return _LogProbs(policy_S.view(2, -1), reference_S.view(2, -1), chosen_mean_B, lengths_S, hidden_ND, routing)


def _distilled(
    model: LlavaForConditionalGeneration, batch: TrainBatch, found: _LogProbs, distillation: Distillation
) -> LossTerms:
    """The divergence of the chosen responses, each the mean over its tokens; metrics likewise."""
    assert batch.targets is not None
    chosen_C = slice(len(batch.targets))
    weights_C = 1.0 / found.lengths_S[batch.batch.sequence_of_N[chosen_C]]
    return distillation(found.hidden_ND[chosen_C], head_weight(model), batch.targets, weights_N=weights_C)
