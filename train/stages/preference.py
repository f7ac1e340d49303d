"""Preference distillation: the student learns which response to prefer, the cached teacher being the reference.

Letters: B pairs of a micro-batch, S = 2·B sequences, the chosen ones before the rejected ones, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llavamod_offline.losses.fused import sequence_log_probs_from_hidden
from llavamod_offline.losses.preference import PreferenceKind, preference_loss
from llavamod_offline.models.forward import head_weight
from llavamod_offline.models.routing import Routing
from train.batches import TrainBatch
from train.engine import World
from train.stages.student_pass import predicting_states, with_balance
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
    vocab_size: int,
    router_aux_coef: float,
    train_vision: bool,
) -> Loss:
    """The loss of a micro-batch, summed over its pairs.

    It takes, for `kto_pair`, the mean log-ratios [2] of the chosen and the rejected responses over the global batch.
    """

    def loss(model: LlavaForConditionalGeneration, batch: TrainBatch, mean_ratios_2: Tensor | None) -> LossSums:
        policy_2B, reference_2B, routing = _log_probs(model, batch, vocab_size, average_log_probs, train_vision)
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
        means = {
            "reward_accuracy": result.correct_B.float().sum(),
            "reward_margin": result.margins_B.sum(),
            "chosen_log_prob": policy_2B[0].detach().sum(),
            "rejected_log_prob": policy_2B[1].detach().sum(),
        }
        spreads = {"chosen_reward": result.chosen_rewards_B, "rejected_reward": result.rejected_rewards_B}
        sums = LossSums(result.loss_sum, means=means, spreads=spreads)
        return with_balance(sums, routing, coefficient=router_aux_coef, count=batch.samples)

    return loss


def make_log_ratios(*, average_log_probs: bool, vocab_size: int) -> LogRatios:
    """The log-ratios [2, B] of policy and reference of a micro-batch, without gradient."""

    def log_ratios(model: LlavaForConditionalGeneration, batch: TrainBatch) -> Tensor:
        with torch.no_grad():
            policy_2B, reference_2B, _ = _log_probs(model, batch, vocab_size, average_log_probs, False)
            return policy_2B - reference_2B

    return log_ratios


def mean_log_ratios(ratios: Sequence[Tensor], world: World) -> Tensor:
    """The mean log-ratios [2] over all micro-batches [2, B] of all processes: what `kto_pair` measures its KL by."""
    totals_2 = torch.stack([ratios_2B.double().sum(1) for ratios_2B in ratios]).sum(0)
    count = totals_2.new_tensor([sum(ratios_2B.shape[1] for ratios_2B in ratios)])
    summed = world.sum(torch.cat([totals_2, count]))
    return (summed[:2] / summed[2]).float()


def _log_probs(
    model: LlavaForConditionalGeneration, batch: TrainBatch, vocab_size: int, average: bool, train_vision: bool
) -> tuple[Tensor, Tensor, Routing]:
    """The log-probs [2, B] of policy and reference for the chosen (0) and the rejected (1) responses."""
    assert batch.reference_S is not None
    inputs = batch.batch
    hidden_ND, routing = predicting_states(model, batch, train_vision=train_vision)
    policy_S = sequence_log_probs_from_hidden(
        hidden_ND, head_weight(model), inputs.target_ids_N, inputs.sequence_of_N, len(inputs), vocab_size=vocab_size
    )
    reference_S = batch.reference_S
    if average:
        lengths_S = torch.bincount(inputs.sequence_of_N, minlength=len(inputs))
        policy_S, reference_S = policy_S / lengths_S, reference_S / lengths_S
    return policy_S.view(2, -1), reference_S.view(2, -1), routing
