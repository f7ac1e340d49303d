"""A stage's objective, as the loop uses it, and the module that DeepSpeed wraps: the student with its loss.

The loss runs inside the engine's forward pass, where ZeRO-3 has gathered the LM head that the fused loss needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.policy import IMPORTANCE_MAX
from llavamod_offline.losses.tail_estimators import TailPrior
from train.config import LossConfig
from train.data.batches import ChosenPositions, TrainBatch
from train.engine.deepspeed_engine import World
from train.stages import mimic, other_tokenizer, own_answers, preference, sft
from train.stages.alignment import Alignment
from train.stages.loss_sums import LossSums
from train.stages.student_pass import LookAhead, StudentPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Student = Any


@dataclass(frozen=True)
class Objective:
    """What a stage optimises.

    `loss(student, batch, shared, features)` returns a micro-batch's sums, `count` its units. `shared` is common to all
    losses of a step and computed before them: from `totals`, summed over all micro-batches without running the student,
    or by running `look_ahead` over them and combining the results with `share`; each loss then also gets its features.
    `projection`: a module trained with the student. `units_are_positions`: whether the units are the positions that the
    loss covers; otherwise it covers all of a micro-batch.
    """

    loss: Callable[[Student, TrainBatch, Tensor | None, Tensor | None], LossSums]
    count: Callable[[TrainBatch], int]
    totals: Callable[[TrainBatch], Tensor] | None = None
    look_ahead: Callable[[Student, TrainBatch], LookAhead] | None = None
    share: Callable[[Sequence[Tensor], World], Tensor] | None = None
    projection: nn.Module | None = None
    units_are_positions: bool = True

    def positions(self, batch: TrainBatch) -> int:
        """The number of positions that the loss covers."""
        return self.count(batch) if self.units_are_positions else batch.positions


class StudentWithLoss(nn.Module):
    """The module that the engine wraps: `forward` returns a micro-batch's loss as a separate tensor, and its sums.

    The projection is a sibling of the student, so it is not exported with it.
    """

    def __init__(self, student: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.projection = objective.projection
        self._objective = objective

    def forward(
        self,
        batch: TrainBatch,
        shared: Tensor | None,
        features: Tensor | None = None,
        *,
        units: float = 1.0,
        tokens: float = 1.0,
        ahead: bool = False,
    ) -> Any:
        """Return a micro-batch's share of the loss of a step with that many `units` and `tokens`, and its sums.

        With `ahead`, return its look-ahead instead.
        """
        if ahead:
            assert self._objective.look_ahead is not None
            return self._objective.look_ahead(self.student, batch)
        sums = self._objective.loss(self.student, batch, shared, features)
        return sums.share(units, tokens), sums


def make_objective(
    stage: str,
    loss: LossConfig,
    *,
    vocab_size: int,
    forward: StudentPass,
    tail: TailEstimator = "bucket",
    prior: TailPrior | None = None,
    positions: Positions = "response",
    alignment: Alignment | None = None,
    paired: bool = True,
    has_counterpart_V: Tensor | None = None,
) -> Objective:
    """Make a stage's objective; `vocab_size` is the number of ids that can have a probability.

    The mimic stages also use `positions`, which their batches hold, and `alignment`, their additional terms. `paired`:
    whether every preference is a pair. `has_counterpart_V`: which of the student's tokens a teacher with another
    tokenizer also has.
    """
    common: dict[str, Any] = {"router_aux_coef": loss.router_aux_coef, "forward": forward}
    if stage in ("align", "sft"):
        supervised = sft.make_loss(vocab_size=vocab_size, **common)
        return Objective(lambda student, batch, *_: supervised(student, batch), lambda batch: batch.positions)
    distillation = partial(
        distillation_from_hidden,
        divergence=loss.divergence,
        js_weight=loss.js_weight,
        skew=loss.skew,
        tail=tail,
        prior=prior,
        temperature=loss.temperature,
    )
    lm_weight = loss.lm_weight if loss.kind == "kd_lm" else 0.0
    if has_counterpart_V is not None:
        across = other_tokenizer.make_loss(
            divergence=loss.divergence,
            js_weight=loss.js_weight,
            skew=loss.skew,
            kd_weight=loss.kd_weight,
            unmatched_weight=1.0 if loss.unmatched_weight is None else loss.unmatched_weight,
            lm_weight=lm_weight,
            has_counterpart_V=has_counterpart_V,
            **common,
        )
        return Objective(lambda student, batch, *_: across(student, batch), lambda batch: batch.positions)
    if loss.kind == "policy_gradient":
        own = own_answers.make_loss(
            vocab_size=vocab_size, importance_max=loss.importance_max or IMPORTANCE_MAX, **common
        )
        return Objective(lambda student, batch, *_: own(student, batch), partial(mimic.count_units, chosen="written"))
    if stage in ("mimic_dense", "mimic_sparse"):
        where: ChosenPositions | None = "written" if loss.positions == "written" else None
        if positions == "all" and loss.positions == "response":
            where = "response"
        chosen: dict[str, Any] = {
            "lm_weight": lm_weight,
            "chosen": where,
            "alignment": alignment,
        }
        totals = mimic.make_totals(all_positions=positions == "all", **chosen)
        imitation = mimic.make_loss(
            distillation=partial(distillation, kd_weight=loss.kd_weight), totals=totals, **chosen, **common
        )
        return Objective(
            lambda student, batch, shared, _: imitation(student, batch, shared),
            partial(mimic.count_units, chosen=where),
            totals=totals,
            projection=None if alignment is None else alignment.projection,
        )
    settings: dict[str, Any] = {"average_log_probs": loss.average_log_probs, "vocab_size": vocab_size}
    preferring = preference.make_loss(
        kind=cast("preference.Kind", loss.kind),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
        sft_weight=loss.sft_weight,
        distill_weight=loss.distill_weight,
        distillation=distillation,
        paired=paired,
        **settings,
        **common,
    )
    look_ahead = preference.make_log_ratios(mismatched=loss.kind == "kto", forward=forward, **settings)
    shared = loss.kind in ("kto_pair", "kto")
    return Objective(
        preferring,
        lambda batch: batch.samples,
        look_ahead=look_ahead if shared else None,
        share=preference.mean_log_ratios if shared else None,
        units_are_positions=False,
    )
