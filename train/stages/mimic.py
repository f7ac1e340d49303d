"""Mimic distillation: the student imitates the cached teacher's distributions, dense or sparse alike.

The loss of a step is the mean over all its supervised positions of
kd_weight · T² · KL(teacher ‖ student) + lm_weight · cross-entropy, plus the routers' balance loss once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llavamod_offline.losses.divergence import Tail
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.models.forward import head_weight
from train.batches import TrainBatch
from train.stages.student_pass import predicting_states, with_balance
from train.sums import LossSums

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def make_loss(
    *,
    tail: Tail,
    temperature: float,
    kd_weight: float,
    lm_weight: float,
    router_aux_coef: float,
    train_vision: bool,
) -> Callable[[LlavaForConditionalGeneration, TrainBatch], LossSums]:
    """The loss of a micro-batch, summed over its supervised positions; `lm_weight` 0 is the original's `only_kd`."""

    def loss(model: LlavaForConditionalGeneration, batch: TrainBatch) -> LossSums:
        assert batch.targets is not None
        hidden_ND, routing = predicting_states(model, batch, train_vision=train_vision)
        terms = distillation_from_hidden(
            hidden_ND,
            head_weight(model),
            batch.targets,
            tail=tail,
            temperature=temperature,
            kd_weight=kd_weight,
            lm_weight=lm_weight,
        )
        means = {"divergence": terms.divergence_sum, **terms.metrics}
        if lm_weight:
            means["cross_entropy"] = terms.cross_entropy_sum
        sums = LossSums(terms.loss_sum, means=means)
        return with_balance(sums, routing, coefficient=router_aux_coef, count=terms.count)

    return loss
