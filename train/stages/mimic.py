"""Mimic distillation: a dense or sparse student imitates the cached teacher's distributions.

The loss of a step is the mean over its positions (all that have a record, those that predict an answer, or those of
answers that a student wrote) of kd_weight · T² · divergence(teacher, student), weighted by what the image is worth to
each position (with `loss.visual_weight`), plus lm_weight times the mean cross-entropy over the positions that predict a
supervised token, plus alignment terms (see `alignment.py`), plus the routers' balance loss once.

Shape suffixes: N positions of a micro-batch, A those of them that predict a supervised token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llavamod_offline.models.lm_head import lm_head_of
from train.data.batches import ChosenPositions, TrainBatch
from train.stages.alignment import Alignment
from train.stages.loss_sums import LossSums
from train.stages.student_pass import Distillation, StudentPass, with_balance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Totals = Callable[[TrainBatch], Tensor]


def make_loss(
    *,
    distillation: Distillation,
    lm_weight: float,
    router_aux_coef: float,
    forward: StudentPass,
    chosen: ChosenPositions | None = None,
    totals: Totals | None = None,
    alignment: Alignment | None = None,
) -> Callable[[PreTrainedModel, TrainBatch, Tensor | None], LossSums]:
    """Return the loss of a micro-batch, summed over its units; `lm_weight` 0 is the original's `only_kd`.

    The units are the batch's positions, or the `chosen` ones. `totals`: from `make_totals` with the same settings; the
    loss takes their sum over the step, or None if the micro-batch is the whole step. A step divides all terms by its
    units, so a term that is a mean over n other items is multiplied by units / n here.
    """

    def loss(model: PreTrainedModel, batch: TrainBatch, shared: Tensor | None) -> LossSums:
        assert batch.targets is not None
        hidden_ND, routing = forward.predicting_states(model, batch)
        per_answer = per_image = 1.0
        if totals is not None:
            units, answers, images = (totals(batch) if shared is None else shared).clamp(min=1).tolist()
            per_answer, per_image = units / answers, units / images
        chosen_ND, targets, weights_N = hidden_ND, batch.targets, batch.weights_N
        if chosen is not None:
            rows_A = batch.rows(chosen)
            chosen_ND, targets = hidden_ND.index_select(0, rows_A), targets.take(rows_A)
            weights_N = None if weights_N is None else weights_N.index_select(0, rows_A)
        terms = distillation(
            chosen_ND, lm_head_of(model), targets, lm_weight=lm_weight * per_answer, weights_N=weights_N
        )
        means = {"divergence": terms.divergence_sum, **terms.metrics}
        if lm_weight:
            means["cross_entropy"] = terms.cross_entropy_sum * per_answer
        total = terms.loss_sum
        if alignment is not None:
            aligned, parts = alignment.terms(
                hidden_ND, lm_head_of(model), batch, per_answer=per_answer, per_image=per_image
            )
            total, means = total + aligned, means | parts
        return with_balance(LossSums(total, means=means), routing, coefficient=router_aux_coef)

    return loss


def count_units(batch: TrainBatch, *, chosen: ChosenPositions | None) -> int:
    """Count the positions of a micro-batch that the divergence covers."""
    return batch.positions if chosen is None else len(batch.rows(chosen))


def make_totals(
    *, lm_weight: float, all_positions: bool, chosen: ChosenPositions | None, alignment: Alignment | None
) -> Totals | None:
    """Return a function that counts a micro-batch's units, positions that predict an answer, and images [3].

    None if all terms are means over the units: the loss then needs no counts.
    """
    if alignment is None and not (lm_weight and all_positions and chosen is None):
        return None

    def totals(batch: TrainBatch) -> Tensor:
        units = count_units(batch, chosen=chosen)
        answers = count_units(batch, chosen="response")
        images = 0 if alignment is None else alignment.images(batch)
        return torch.tensor([units, answers, images], dtype=torch.float64)

    return totals
