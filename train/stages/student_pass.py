"""What every stage does first: the student's hidden states that predict the supervised tokens, and its routing.

Letters: N supervised positions, D hidden size, L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from llavamod_offline.losses.fused import LossTerms
from llavamod_offline.models.forward import student_hidden_states
from llavamod_offline.models.routing import RouterWatch, Routing
from train.batches import TrainBatch
from train.sums import LossSums

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

# `distillation_from_hidden` with the configured divergence: it takes hidden states, head, records, and weights.
Distillation = Callable[..., LossTerms]


def predicting_states(
    model: LlavaForConditionalGeneration, batch: TrainBatch, *, train_vision: bool
) -> tuple[Tensor, Routing]:
    """Run the student; returns hidden states [N, D] in the order of the batch's supervised tokens, and the routing."""
    inputs = batch.batch
    with RouterWatch(model) as watch:
        hidden_BTD = student_hidden_states(
            model,
            inputs.input_ids_BT,
            inputs.attention_mask_BT,
            inputs.pixel_values_ICHW,
            image_rows_Q=inputs.image_rows_P,
            train_vision=train_vision,
        )
    routing = watch.routing(inputs.attention_mask_BT)
    return hidden_BTD.flatten(0, 1).index_select(0, inputs.prediction_rows_N), routing


def with_balance(sums: LossSums, routing: Routing, *, coefficient: float, count: int) -> LossSums:
    """Add the routers' balance loss, weighted by the micro-batch's units so that the step's mean holds it once.

    Logs `balance` and, as totals over tokens, `expert_load` [L, E], `gate_entropy` and `drop_rate` [L]; a dense student
    has none of them.
    """
    if not len(routing.loads_LE):
        return sums
    balance = routing.balance_loss * count
    return LossSums(
        loss=sums.loss + coefficient * balance if coefficient else sums.loss,
        means={**sums.means, "balance": balance.detach()},
        totals={
            **sums.totals,
            "expert_load": routing.loads_LE * routing.tokens,
            "gate_entropy": routing.entropies_L * routing.tokens,
            "drop_rate": routing.drop_rates_L * routing.tokens,
        },
        spreads=sums.spreads,
    )
