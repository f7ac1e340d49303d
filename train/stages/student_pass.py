"""The student's forward pass, shared by all stages: hidden states that predict supervised tokens, and the routing.

Shape suffixes: B sequences, T tokens, N supervised positions, D hidden size, L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from llavamod_offline.families.students.protocol import ForwardPass
from llavamod_offline.losses.fused import LossTerms
from llavamod_offline.models.routing import RouterWatch, Routing
from train.data.batches import TrainBatch
from train.stages.loss_sums import LossSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# `distillation_from_hidden` with the configured divergence: it takes hidden states, LM head, targets and weights.
Distillation = Callable[..., LossTerms]


@dataclass(frozen=True)
class LookAhead:
    """The result of a look-ahead: its `value`, and the shared features of the same samples, to reuse in the loss."""

    value: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class StudentPass:
    """A family's forward pass as losses use it; `train_vision`: the tower is trained."""

    forward: ForwardPass
    train_vision: bool = False

    def features(self, model: PreTrainedModel, batch: TrainBatch) -> Tensor | None:
        """Compute the image features that several passes over a micro-batch can share, if that helps."""
        return self.forward.features(model, batch.batch, train_vision=self.train_vision)

    def predicting_states(
        self, model: PreTrainedModel, batch: TrainBatch, features: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Run the student; returns hidden states [N, D] in the order of the supervised tokens, and the routing."""
        inputs = batch.batch
        with RouterWatch(model) as watch:
            hidden_BTD = self.forward.hidden_states(model, inputs, train_vision=self.train_vision, features=features)
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
