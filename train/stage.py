"""A stage as the loop sees it, and the module that DeepSpeed wraps: the student with the stage's loss inside.

The loss lies inside the engine's forward pass, so that ZeRO-3 has gathered the head when the fused loss wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llavamod_offline.losses.preference import PreferenceKind
from train.batches import TrainBatch
from train.config import TrainConfig
from train.engine import World
from train.stages import align, mimic, preference, sft
from train.sums import LossSums

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Student = Any


@dataclass(frozen=True)
class Stage:
    """What the loop needs of a stage.

    `loss(student, batch, shared)` gives a micro-batch's sums; `count` its units. `look_ahead`, if any, is run over all
    micro-batches of a step before the first loss, and `share` turns its results into what the losses share.
    """

    loss: Callable[[Student, TrainBatch, Tensor | None], LossSums]
    count: Callable[[TrainBatch], int]
    look_ahead: Callable[[Student, TrainBatch], Tensor] | None = None
    share: Callable[[Sequence[Tensor], World], Tensor] | None = None


class StudentWithLoss(nn.Module):
    """The module of the engine: `forward` gives a micro-batch's loss as a tensor of its own, and its sums."""

    def __init__(self, student: LlavaForConditionalGeneration, stage: Stage) -> None:
        super().__init__()
        self.student = student
        self._stage = stage

    def forward(self, batch: TrainBatch, shared: Tensor | None, *, ahead: bool = False) -> Any:
        """The loss and the sums of a micro-batch; with `ahead` what the stage wants to know before any loss."""
        if ahead:
            assert self._stage.look_ahead is not None
            return self._stage.look_ahead(self.student, batch)
        sums = self._stage.loss(self.student, batch, shared)
        return sums.loss, sums


def make_stage(config: TrainConfig, *, vocab_size: int) -> Stage:
    """Choose the loss of the configured stage; `vocab_size` is the number of ids that have a probability."""
    loss = config.loss
    common: dict[str, Any] = {"router_aux_coef": loss.router_aux_coef, "train_vision": "vision" in config.trainable}
    if config.stage in ("align", "sft"):
        supervised = (align if config.stage == "align" else sft).make_loss(vocab_size=vocab_size, **common)
        return Stage(lambda student, batch, _: supervised(student, batch), lambda batch: batch.positions)
    if config.stage in ("mimic_dense", "mimic_sparse"):
        imitation = mimic.make_loss(
            tail=loss.tail,
            temperature=loss.temperature,
            kd_weight=loss.kd_weight,
            lm_weight=loss.lm_weight if loss.kind == "kd_lm" else 0.0,
            **common,
        )
        return Stage(lambda student, batch, _: imitation(student, batch), lambda batch: batch.positions)
    settings: dict[str, Any] = {"average_log_probs": loss.average_log_probs, "vocab_size": vocab_size}
    preferring = preference.make_loss(
        kind=cast("PreferenceKind", loss.kind),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        **settings,
        **common,
    )
    if loss.kind != "kto_pair":
        return Stage(preferring, lambda batch: batch.samples)
    return Stage(
        preferring,
        lambda batch: batch.samples,
        look_ahead=preference.make_log_ratios(**settings),
        share=preference.mean_log_ratios,
    )
