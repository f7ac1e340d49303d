"""The student's forward pass, shared by all stages: hidden states that predict supervised tokens, and the routing.

Shape suffixes: N supervised positions, D hidden size, L sparse layers, E experts, I images of P tokens and C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from llavamod_offline.losses.fused import LossTerms
from llavamod_offline.models.forward import student_hidden_states, vision_features
from llavamod_offline.models.routing import RouterWatch, Routing
from train.data.batches import TrainBatch
from train.stages.loss_sums import LossSums

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

# `distillation_from_hidden` with the configured divergence: it takes hidden states, LM head, targets and weights.
Distillation = Callable[..., LossTerms]


@dataclass(frozen=True)
class TowerAhead:
    """The result of a look-ahead: its `value`, and the tower's features of the same samples, to reuse in the loss."""

    value: Tensor
    features_IPC: Tensor | None = None


def tower_features(
    model: LlavaForConditionalGeneration, batch: TrainBatch, *, train_vision: bool = False
) -> Tensor | None:
    """Compute the vision tower's features of a batch's images, [I, P, C], to reuse in every pass over them in a step.

    None if each pass must run the tower itself: without images, if the tower is trained, or under ZeRO-3, where all
    processes must gather the same weights, whether they have images or not.
    """
    sharded = hasattr(next(model.model.vision_tower.parameters()), "ds_id")
    pixel_values_ICHW = None if train_vision or sharded else batch.batch.pixel_values_ICHW
    return None if pixel_values_ICHW is None else vision_features(model, pixel_values_ICHW)


def predicting_states(
    model: LlavaForConditionalGeneration,
    batch: TrainBatch,
    *,
    train_vision: bool,
    features_IPC: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """Run the student; returns hidden states [N, D] in the order of the batch's supervised tokens, and the routing.

    `features_IPC`: the tower's, if already computed.
    """
    inputs = batch.batch
    with RouterWatch(model) as watch:
        hidden_BTD = student_hidden_states(
            model,
            inputs.input_ids_BT,
            inputs.attention_mask_BT,
            inputs.pixel_values_ICHW if features_IPC is None else None,
            image_rows_Q=inputs.image_rows_P,
            features_IPC=features_IPC,
            train_vision=train_vision,
        )
    routing = watch.routing(inputs.attention_mask_BT)
    return hidden_BTD.flatten(0, 1).index_select(0, inputs.prediction_rows_N), routing


def with_balance(sums: LossSums, routing: Routing, *, coefficient: float) -> LossSums:
    """Add the routers' balance loss: the mean over the step's micro-batches, weighted by the tokens they route.

    Logs, as means over tokens, `balance`, `expert_load` [L, E], `gate_entropy` and `drop_rate` [L], for sparse students
    only.
    """
    if not len(routing.loads_LE):
        return sums
    logged = {
        "balance": routing.balance_loss.detach(),
        "expert_load": routing.loads_LE,
        "gate_entropy": routing.entropies_L,
        "drop_rate": routing.drop_rates_L,
    }
    return replace(
        sums,
        token_loss=coefficient * routing.balance_loss * routing.tokens if coefficient else None,
        token_means={name: value * routing.tokens for name, value in logged.items()},
    )
