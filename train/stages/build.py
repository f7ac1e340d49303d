"""A stage as the loop sees it, and the module that DeepSpeed wraps: the student with the stage's loss inside.

The loss lies inside the engine's forward pass, so that ZeRO-3 has gathered the head when the fused loss wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.shrinkage import Shrinkage
from train.config import TrainConfig
from train.data.batches import TrainBatch
from train.engine.deepspeed_engine import World
from train.stages import align, mimic, preference, sft
from train.stages.alignment import Alignment
from train.stages.loss_sums import LossSums
from train.stages.student_pass import TowerAhead

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Student = Any


@dataclass(frozen=True)
class Objective:
    """What the loop needs of a stage.

    `loss(student, batch, shared, features)` gives a micro-batch's sums; `count` its units. What the losses of a step
    share is made before the first one: `totals`, if any, summed over all micro-batches without running the student; or
    else `look_ahead`, if any, is run over them, `share` makes one of its results, and each loss is handed its features.
    `shrinkage`, if any, is what the loss learns about the records' tails; every step ends with its `finish_step`.
    `projection`, if any, is trained beside the student.
    """

    loss: Callable[[Student, TrainBatch, Tensor | None, Tensor | None], LossSums]
    count: Callable[[TrainBatch], int]
    totals: Callable[[TrainBatch], Tensor] | None = None
    look_ahead: Callable[[Student, TrainBatch], TowerAhead] | None = None
    share: Callable[[Sequence[Tensor], World], Tensor] | None = None
    shrinkage: Shrinkage | None = None
    projection: nn.Module | None = None


class StudentWithLoss(nn.Module):
    """The module of the engine: `forward` gives a micro-batch's loss as a tensor of its own, and its sums.

    What is trained beside the student is a module of its own here, so that exporting the student leaves it behind.
    """

    def __init__(self, student: LlavaForConditionalGeneration, stage: Objective) -> None:
        super().__init__()
        self.student = student
        self.projection = stage.projection
        self._stage = stage

    def forward(
        self, batch: TrainBatch, shared: Tensor | None, features_IPC: Tensor | None = None, *, ahead: bool = False
    ) -> Any:
        """The loss and the sums of a micro-batch; with `ahead` what the stage wants to know before any loss."""
        if ahead:
            assert self._stage.look_ahead is not None
            return self._stage.look_ahead(self.student, batch)
        sums = self._stage.loss(self.student, batch, shared, features_IPC)
        return sums.loss, sums


def make_stage(
    config: TrainConfig,
    *,
    vocab_size: int,
    cached_vocab_size: int | None,
    tail_profile_V: Tensor | None = None,
    positions: Positions = "response",
    alignment: Alignment | None = None,
) -> Objective:
    """Choose the loss of the configured stage; `vocab_size` is the number of ids that have a probability.

    `cached_vocab_size`: that of the records, where there is a cache; `tail_profile_V` its mean tail, where it has one.
    `positions`: the ones that the mimic stages' batches are about; `alignment` what these compare beside distributions.
    """
    loss = config.loss
    common: dict[str, Any] = {"router_aux_coef": loss.router_aux_coef, "train_vision": "vision" in config.trainable}
    if config.stage in ("align", "sft"):
        supervised = (align if config.stage == "align" else sft).make_loss(vocab_size=vocab_size, **common)
        return Objective(lambda student, batch, *_: supervised(student, batch), lambda batch: batch.positions)
    shrinkage = None
    if loss.distils(config.stage) and loss.tail_estimator == "shrink" and loss.temperature == 1.0:
        assert cached_vocab_size is not None
        shrinkage = _shrinkage(config, cached_vocab_size, tail_profile_V)
    distillation = partial(
        distillation_from_hidden,
        divergence=loss.divergence,
        js_weight=loss.js_weight,
        skew=loss.skew,
        tail=loss.tail_estimator,
        shrinkage=shrinkage,
        temperature=loss.temperature,
    )
    if config.stage in ("mimic_dense", "mimic_sparse"):
        answers_only = positions == "all" and loss.positions == "response"
        chosen: dict[str, Any] = {
            "lm_weight": loss.lm_weight if loss.kind == "kd_lm" else 0.0,
            "answers_only": answers_only,
            "alignment": alignment,
        }
        totals = mimic.make_totals(all_positions=positions == "all", **chosen)
        imitation = mimic.make_loss(
            distillation=partial(distillation, kd_weight=loss.kd_weight), totals=totals, **chosen, **common
        )
        return Objective(
            lambda student, batch, shared, _: imitation(student, batch, shared),
            partial(mimic.count_units, answers_only=answers_only),
            totals=totals,
            shrinkage=shrinkage,
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
        **settings,
        **common,
    )
    look_ahead = preference.make_log_ratios(
        mismatched=loss.kind == "kto", train_vision=common["train_vision"], **settings
    )
    shared = loss.kind in ("kto_pair", "kto")
    return Objective(
        preferring,
        lambda batch: batch.samples,
        look_ahead=look_ahead if shared else None,
        share=preference.mean_log_ratios if shared else None,
        shrinkage=shrinkage,
    )


def _shrinkage(config: TrainConfig, vocab_size: int, tail_profile_V: Tensor | None) -> Shrinkage:
    """The tail's state, at its beginning; of a profile over more ids those that the student has are taken."""
    if tail_profile_V is not None and len(tail_profile_V) > vocab_size:
        tail_profile_V = tail_profile_V[:vocab_size] / tail_profile_V[:vocab_size].sum()
    horizon = 1 / (1 - config.optim.betas[0])  # the steps that AdamW's first moment averages over
    return Shrinkage(vocab_size, profile_V=tail_profile_V, horizon=horizon, seed=config.seed)
