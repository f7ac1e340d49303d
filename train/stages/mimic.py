"""Mimic distillation: the student imitates the cached teacher's distributions, dense or sparse alike.

The loss of a step is the mean over all its recorded positions of kd_weight · T² · divergence(teacher, student), plus
lm_weight times the mean cross-entropy over those that predict a supervised token, plus the routers' balance loss once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llavamod_offline.data.tokenise import NO_TARGET
from llavamod_offline.models.forward import head_weight
from train.batches import TrainBatch
from train.engine import World
from train.stages.student_pass import Distillation, predicting_states, with_balance
from train.sums import LossSums

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def make_loss(
    *,
    distillation: Distillation,
    lm_weight: float,
    all_positions: bool,
    router_aux_coef: float,
    train_vision: bool,
) -> Callable[[LlavaForConditionalGeneration, TrainBatch, Tensor | None], LossSums]:
    """The loss of a micro-batch, summed over its positions; `lm_weight` 0 is the original's `only_kd`.

    With `all_positions` the loss takes `positions_per_target` of the step, None where the micro-batch is the whole
    step. A step divides both parts by its positions, so this makes the cross-entropy's mean one over those with a
    target.
    """

    def loss(model: LlavaForConditionalGeneration, batch: TrainBatch, shared: Tensor | None) -> LossSums:
        assert batch.targets is not None
        hidden_ND, routing = predicting_states(model, batch, train_vision=train_vision)
        ratio = 1.0
        if all_positions:
            ratio = float(positions_per_target([count_targets(model, batch)], None) if shared is None else shared)
        terms = distillation(hidden_ND, head_weight(model), batch.targets, lm_weight=lm_weight * ratio)
        means = {"divergence": terms.divergence_sum, **terms.metrics}
        if lm_weight:
            means["cross_entropy"] = terms.cross_entropy_sum * ratio
        sums = LossSums(terms.loss_sum, means=means)
        return with_balance(sums, routing, coefficient=router_aux_coef, count=terms.count)

    return loss


def count_targets(model: LlavaForConditionalGeneration, batch: TrainBatch) -> Tensor:
    """The micro-batch's positions, and those of them that predict a supervised token [2]; the model is not run."""
    targets_N = batch.batch.target_ids_N
    return torch.stack([(targets_N >= NO_TARGET).sum(), (targets_N != NO_TARGET).sum()])


def positions_per_target(counts: Sequence[Tensor], world: World | None) -> Tensor:
    """Positions over positions with a target, of all micro-batches [2] of all processes."""
    totals_2 = torch.stack(list(counts)).double().sum(0)
    if world is not None:
        totals_2 = world.sum(totals_2)
    return totals_2[0] / totals_2[1].clamp(min=1.0)
