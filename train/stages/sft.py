"""The align and sft stages: cross-entropy on the supervised tokens, without a teacher. Their recipes differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llavamod_offline.losses.fused import cross_entropy_from_hidden
from llavamod_offline.models.lm_head import lm_head_of
from train.data.batches import TrainBatch
from train.stages.loss_sums import LossSums
from train.stages.student_pass import StudentPass, with_balance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_loss(
    *, vocab_size: int, router_aux_coef: float, forward: StudentPass
) -> Callable[[PreTrainedModel, TrainBatch], LossSums]:
    """Return the loss of a micro-batch, summed over its positions; ids from `vocab_size` on get probability 0."""

    def loss(model: PreTrainedModel, batch: TrainBatch) -> LossSums:
        hidden_ND, routing = forward.predicting_states(model, batch)
        terms = cross_entropy_from_hidden(hidden_ND, lm_head_of(model), batch.batch.target_ids_N, vocab_size=vocab_size)
        sums = LossSums(terms.loss_sum, means={"cross_entropy": terms.cross_entropy_sum})
        return with_balance(sums, routing, coefficient=router_aux_coef)

    return loss
