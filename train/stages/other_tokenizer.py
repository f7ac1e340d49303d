"""Mimic distillation from a teacher with another tokenizer, over the spans of tokens that both share.

The loss of a step is kd_weight · (divergence + unmatched_weight · sorted distance), summed over its spans, plus
lm_weight · cross-entropy, summed over the student's supervised tokens, both divided by the number of these tokens; plus
the routers' balance loss once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from llavamod_offline.losses.kinds import DivergenceKind
from llavamod_offline.losses.other_tokenizer.divergence import aligned_distillation_from_hidden
from llavamod_offline.models.lm_head import lm_head_of
from train.data.batches import TrainBatch
from train.stages.loss_sums import LossSums
from train.stages.student_pass import StudentPass, with_balance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_loss(
    *,
    divergence: DivergenceKind,
    js_weight: float,
    skew: float,
    kd_weight: float,
    unmatched_weight: float,
    lm_weight: float,
    has_counterpart_V: Tensor,
    router_aux_coef: float,
    forward: StudentPass,
) -> Callable[[PreTrainedModel, TrainBatch], LossSums]:
    """Return the loss of a micro-batch, summed over its tokens; see `aligned_distillation_from_hidden`."""

    def loss(model: PreTrainedModel, batch: TrainBatch) -> LossSums:
        assert batch.aligned is not None
        hidden_ND, routing = forward.predicting_states(model, batch)
        terms = aligned_distillation_from_hidden(
            hidden_ND,
            lm_head_of(model),
            batch.batch.target_ids_N,
            batch.aligned,
            has_counterpart_V=has_counterpart_V.to(hidden_ND.device),
            divergence=divergence,
            js_weight=js_weight,
            skew=skew,
            kd_weight=kd_weight,
            unmatched_weight=unmatched_weight,
            lm_weight=lm_weight,
        )
        means = {"divergence": terms.divergence_sum, **terms.metrics}
        if lm_weight:
            means["cross_entropy"] = terms.cross_entropy_sum
        return with_balance(LossSums(terms.loss_sum, means=means), routing, coefficient=router_aux_coef)

    return loss
