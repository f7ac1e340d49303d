"""Alignment terms that mimic distillation adds to its divergence: features, image tokens, relations between them.

Shape suffixes: N positions of a micro-batch, M those with a teacher's hidden state, A those of them that predict
answers, I images (at their places in the sequences), P tokens of one, Q = I·P, D and T the hidden sizes of student
and teacher, V rows of the student's LM head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.losses.alignment import (
    HiddenProjection,
    hidden_alignment,
    hidden_relations,
    lm_head_metric,
    relation_alignment,
    visual_token_kl,
)
from llavamod_offline.models.lm_head import LmHead
from train.config import AlignConfig
from train.data.batches import TrainBatch
from train.data.teacher_states import TeacherStates, WantedStates, image_positions


@dataclass(frozen=True, eq=False)
class Alignment:
    """The terms of `settings` that have a weight.

    `image_tokens`: the tokens of one image, 0 if they depend on its size; then no term covers images. `states`: the
    teacher's hidden states that a batch must hold. `vocab_size`: how many ids' logits are compared, None: all.
    `projection` maps the student's features to the teacher's size; `teacher_metric_TT` is WᵀW of the teacher's LM head,
    for relations of logits, on the run's device.
    """

    settings: AlignConfig
    image_token_id: int
    image_tokens: int
    states: WantedStates | None = None
    vocab_size: int | None = None
    projection: HiddenProjection | None = None
    teacher_metric_TT: Tensor | None = None

    def images(self, batch: TrainBatch) -> int:
        """Count the images of a micro-batch, with repetitions."""
        if not self.image_tokens:
            return 0
        return int((batch.batch.input_ids_BT == self.image_token_id).sum()) // self.image_tokens

    def terms(
        self, hidden_ND: Tensor, lm_head: LmHead, batch: TrainBatch, *, per_answer: float, per_image: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of all terms, with gradient, and each term by itself, detached.

        A term is a sum over its positions or images, times the step's units per position that predicts an answer
        (`per_answer`) or per image (`per_image`), so that dividing by the step's units gives the term's mean.
        """
        settings = self.settings
        table = {
            "feature_distance": (settings.feature_weight, self._features, per_answer),
            "visual_kl": (settings.visual_kl_weight, self._visual_kl, per_image / max(self.image_tokens, 1)),
            "relation_distance": (settings.relation_weight, self._relations, per_image),
        }
        total, parts = hidden_ND.new_zeros(()).float(), {}
        for name, (weight, term, scale) in table.items():
            if weight:
                part = term(hidden_ND, lm_head, batch) * scale
                total, parts[name] = total + weight * part, part.detach()
        return total, parts

    def _features(self, hidden_ND: Tensor, lm_head: LmHead, batch: TrainBatch) -> Tensor:
        assert self.projection is not None
        states = _states(batch)
        answers_M = batch.batch.target_ids_N.index_select(0, states.rows_M) != NO_TARGET
        projected_AT = self.projection(hidden_ND.index_select(0, states.rows_M[answers_M]))
        return hidden_alignment(projected_AT, states.states_MT[answers_M], distance=self.settings.feature_distance)

    def _visual_kl(self, hidden_ND: Tensor, lm_head: LmHead, batch: TrainBatch) -> Tensor:
        assert batch.targets is not None
        rows_Q = image_positions(batch.batch, self.image_token_id).nonzero()[:, 0]
        return visual_token_kl(hidden_ND.index_select(0, rows_Q), lm_head, batch.targets.take(rows_Q)).loss_sum

    def _relations(self, hidden_ND: Tensor, lm_head: LmHead, batch: TrainBatch) -> Tensor:
        states = _states(batch)
        images_M = image_positions(batch.batch, self.image_token_id).index_select(0, states.rows_M)
        student_IPD, teacher_IPT = (
            rows_QD.view(-1 if len(rows_QD) else 0, self.image_tokens, rows_QD.shape[1])
            for rows_QD in (hidden_ND.index_select(0, states.rows_M[images_M]), states.states_MT[images_M])
        )
        metric_DD = None
        if self.teacher_metric_TT is not None:
            metric_DD = lm_head_metric(lm_head.weight_VD, vocab_size=self.vocab_size)
        return relation_alignment(
            hidden_relations(student_IPD, metric_DD), hidden_relations(teacher_IPT, self.teacher_metric_TT)
        )


def _states(batch: TrainBatch) -> TeacherStates:
    assert batch.states is not None
    return batch.states
