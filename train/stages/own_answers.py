"""The policy gradient of the mimic stages: a student learns from the teacher's log-probs of what it wrote itself.

The loss of a step is the mean over the written tokens of `policy_gradient`, plus the routers' balance loss once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llavamod_offline.losses.fused import sequence_log_probs_from_hidden
from llavamod_offline.losses.policy import policy_gradient
from llavamod_offline.models.lm_head import lm_head_of
from train.data.batches import TrainBatch
from train.stages.loss_sums import LossSums
from train.stages.student_pass import StudentPass, with_balance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_loss(
    *, vocab_size: int, importance_max: float, router_aux_coef: float, forward: StudentPass
) -> Callable[[PreTrainedModel, TrainBatch], LossSums]:
    """Return the loss of a micro-batch, summed over its written tokens; see `policy_gradient`."""

    def loss(model: PreTrainedModel, batch: TrainBatch) -> LossSums:
        assert batch.targets is not None
        assert batch.behaviour_N is not None
        rows_W = batch.rows("written")
        hidden_ND, routing = forward.predicting_states(model, batch)
        log_probs_W = sequence_log_probs_from_hidden(
            hidden_ND.index_select(0, rows_W),
            lm_head_of(model),
            batch.batch.target_ids_N[rows_W],
            torch.arange(len(rows_W), device=rows_W.device),
            len(rows_W),
            vocab_size=vocab_size,
        )
        terms = policy_gradient(
            log_probs_W,
            batch.targets.target_log_probs_N[rows_W],
            batch.behaviour_N[rows_W],
            importance_max=importance_max,
        )
        return with_balance(LossSums(terms.loss_sum, means=terms.metrics), routing, coefficient=router_aux_coef)

    return loss
