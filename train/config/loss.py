"""The loss of a training run: its settings, and checks that they suit the stage and each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from llavamod_offline.config import InputPath
from llavamod_offline.losses.kinds import (
    PREFERENCE_KINDS,
    DivergenceKind,
    HiddenDistance,
    Positions,
    PreferenceKind,
    RelationSource,
    TailEstimator,
)

LossKind = Literal["cross_entropy", "only_kd", "kd_lm", "policy_gradient", "kto", PreferenceKind]

LOSSES_OF_STAGE: dict[str, tuple[str, ...]] = {
    "align": ("cross_entropy",),
    "sft": ("cross_entropy",),
    "mimic_dense": ("only_kd", "kd_lm", "policy_gradient"),
    "mimic_sparse": ("only_kd", "kd_lm", "policy_gradient"),
    "preference": ("kto", *PREFERENCE_KINDS),
}
# For each setting, the divergences that use it; with the others, it must keep its default.
_DIVERGENCES_OF: dict[str, tuple[str, ...]] = {
    "js_weight": ("js",),
    "skew": ("skewed_forward_kl", "skewed_reverse_kl"),
}


@dataclass(frozen=True)
class AlignConfig:
    """Additional terms of the mimic stages, each a mean times its weight."""

    feature_weight: float = 0.0
    """LLAVADI: weight of the distance from the teacher's last hidden states at the positions that predict answers,
    after a projection that is trained with the student but not exported."""
    feature_distance: HiddenDistance = "mse"
    """Distance between these hidden states."""
    visual_kl_weight: float = 0.0
    """LLaVA-KD: weight of the forward KL at image tokens, with the tail as one bucket."""
    relation_weight: float = 0.0
    """LLaVA-KD: weight of the relations between an image's tokens, compared by the cosine of Gram matrices."""
    relation_of: RelationSource = "hidden"
    """What relations are computed from: last hidden states, or logits."""
    teacher_lm_head: InputPath | None = None
    """Folder or Hub id of the teacher's checkpoint, whose LM head is needed for relations between logits."""

    @property
    def is_on(self) -> bool:
        """Whether any term has a weight."""
        return any(getattr(self, name) for name in ALIGN_WEIGHTS)

    @property
    def wants_states(self) -> bool:
        """Whether a term needs the teacher's hidden states."""
        return bool(self.feature_weight or self.relation_weight)


ALIGN_WEIGHTS = ("feature_weight", "visual_kl_weight", "relation_weight")


@dataclass(frozen=True)
class LossConfig:
    """The loss: distillation in the mimic stages, log-probs of answers in preference, else cross-entropy."""

    kind: LossKind = "cross_entropy"
    """The loss: cross_entropy (align, sft), only_kd, kd_lm or policy_gradient (mimic stages), all others (preference).
    policy_gradient: reverse KL on a student's own answers, using only the teacher's log-probs of their tokens, so that
    capture.preset=reference is enough."""
    divergence: DivergenceKind = "forward_kl"
    """Distillation: the divergence of the student's distribution from the teacher's."""
    js_weight: float = 0.5
    """The teacher's weight in js, between 0 and 1."""
    skew: float = 0.1
    """Skewed divergences: share of one distribution that is mixed into the other, between 0 and 1."""
    tail: Literal["auto", TailEstimator] = "auto"
    """Estimator of the teacher's tail; auto: samples with forward_kl, otherwise bucket."""
    temperature: float = 1.0
    """Distillation: temperature of both distributions: the cache's capture.temperature or, with tail=bucket, 1 or one
    of its capture.temperatures."""
    kd_weight: float = 1.0
    """Weight of the divergence."""
    lm_weight: float = 1.0
    """Weight of the cross-entropy in kd_lm."""
    visual_weight: float = 0.0
    """Mimic stages: how much additional weight a token that only the image makes likely gets over one that needs no
    image; 1: twice the weight; 0: all the same. Weights have mean 1; needs a cache with capture.without_image."""
    positions: Positions = "auto"
    """Mimic stages: positions to distil at: auto (all that the cache records), response (those that predict answers),
    or written (those of answers that a student wrote itself with cache-teacher generate; policy_gradient always uses
    these)."""
    special_tokens: Literal["mask", "keep"] | None = None
    """Whether the loss on written answers leaves out special tokens (mask) or not (keep); null: mask if
    cache.end_of_turn is set, else keep."""
    importance_max: float | None = None
    """policy_gradient: upper limit of a token's importance weight, its probability under the student divided by that
    under the writer; null: 2; .inf: no limit."""
    unmatched_weight: float | None = None
    """With cache.other_tokenizer=align: weight of the distance between the sorted probabilities of tokens that only one
    tokenizer has; null: 1."""
    align: AlignConfig = field(default_factory=AlignConfig)
    beta: float = 0.1
    """Preference: scale of the log-ratio between student and reference."""
    label_smoothing: float = 0.0
    """Preference with sigmoid: assumed share of wrongly labelled pairs, at least 0 and below 0.5."""
    average_log_probs: bool = False
    """Preference: average the log-probs of an answer's tokens instead of summing them; recommended with ipo."""
    desirable_weight: float = 1.0
    """Preference with kto: weight of chosen responses and of unpaired desirable ones."""
    undesirable_weight: float = 1.0
    """Preference with kto: weight of rejected responses and of unpaired undesirable ones."""
    sft_weight: float = 0.0
    """Preference: weight of the chosen response's mean negative log-prob."""
    distill_weight: float = 0.0
    """Preference: weight of the chosen response's mean divergence from the cached teacher."""
    router_aux_coef: float = 0.0
    """Sparse students: weight of the loss that balances the load of the experts; 0: none."""

    @property
    def on_own_answers(self) -> bool:
        """Whether the loss covers only what a student wrote itself."""
        return self.kind == "policy_gradient" or self.positions == "written"

    def distils(self, stage: str) -> bool:
        """Whether a stage with this loss learns from the teacher's distributions, or its log-probs of the tokens."""
        return stage.startswith("mimic") or (stage == "preference" and self.distill_weight > 0)


def loss_problems(loss: LossConfig, stage: str) -> Iterable[str]:
    """Yield one line for each problem, naming the key to change."""
    yield from _number_problems(loss)
    if loss.kind not in LOSSES_OF_STAGE[stage]:
        choice = " or ".join(LOSSES_OF_STAGE[stage])
        yield f"loss.kind: '{loss.kind}' does not belong to stage {stage}: set it to {choice}"
    if loss.kind != "sigmoid" and loss.label_smoothing:
        yield f"loss.label_smoothing: not used with {loss.kind}: set it to 0, or loss.kind to sigmoid"
    for name in ("desirable_weight", "undesirable_weight"):
        if loss.kind != "kto" and getattr(loss, name) != 1.0:
            yield f"loss.{name}: not used with {loss.kind}: remove it, or set loss.kind to kto"
    if loss.kind == "kto" and loss.desirable_weight == loss.undesirable_weight == 0:
        yield "loss.desirable_weight: this and loss.undesirable_weight are both 0: set one of them above 0"
    if loss.kind != "kd_lm" and loss.lm_weight != LossConfig.lm_weight:
        way_out = "remove it, or set loss.kind to kd_lm" if stage.startswith("mimic") else "remove it"
        yield f"loss.lm_weight: not used with {loss.kind}: {way_out}"
    if stage.startswith("mimic") and not loss.kd_weight:
        yield "loss.kd_weight: 0 turns distillation off: set it above 0, or use stage sft"
    if stage != "preference":
        for name in ("beta", "average_log_probs", "sft_weight", "distill_weight"):
            if getattr(loss, name) != getattr(LossConfig, name):
                yield f"loss.{name}: belongs to stage preference, not to {stage}: remove it"
    if not stage.startswith("mimic"):
        for name in ("kd_weight", "visual_weight"):
            if getattr(loss, name) != getattr(LossConfig, name):
                yield f"loss.{name}: belongs to the mimic stages, not to {stage}: remove it"
    yield from _own_answer_problems(loss)
    yield from _divergence_problems(loss, stage)
    yield from _align_problems(loss, stage)


def _own_answer_problems(loss: LossConfig) -> Iterable[str]:
    if loss.kind == "kd_lm" and loss.positions == "written":
        yield "loss.kind: kd_lm would teach a student its own answers: set it to only_kd, or loss.positions to response"
    if loss.special_tokens is not None and not loss.on_own_answers:
        yield "loss.special_tokens: not used without written answers: remove it, or set loss.positions to written"
    if loss.kind != "policy_gradient":
        if loss.importance_max is not None:
            yield f"loss.importance_max: not used with {loss.kind}: remove it, or set loss.kind to policy_gradient"
        return
    for name in ("divergence", "tail", "temperature", "kd_weight", "visual_weight"):
        if getattr(loss, name) != getattr(LossConfig, name):
            yield f"loss.{name}: not used with policy_gradient: remove it, or set loss.kind to only_kd"
    if loss.positions == "response":
        yield "loss.positions: policy_gradient learns from written answers alone: set it to written or auto"
    if loss.align.is_on:
        yield "loss.align: policy_gradient has no further terms: set its weights to 0, or loss.kind to only_kd"


def _divergence_problems(loss: LossConfig, stage: str) -> Iterable[str]:
    if loss.divergence != "forward_kl" and not loss.distils(stage):
        way_out = "set loss.distill_weight above 0" if stage == "preference" else "use a mimic stage"
        yield f"loss.divergence: nothing is distilled in stage {stage}: set it to forward_kl, or {way_out}"
    for name in ("tail", "temperature"):
        if getattr(loss, name) != getattr(LossConfig, name) and not loss.distils(stage):
            yield f"loss.{name}: nothing is distilled in stage {stage}: remove it"
    if loss.divergence != "forward_kl" and loss.tail not in ("auto", "bucket"):
        yield (
            f"loss.tail: {loss.divergence} is defined on top-k and bucket: set it to bucket, or loss.divergence to "
            "forward_kl"
        )
    for name, divergences in _DIVERGENCES_OF.items():
        if getattr(loss, name) != getattr(LossConfig, name) and loss.divergence not in divergences:
            yield (
                f"loss.{name}: not used with {loss.divergence}: remove it, or set loss.divergence to "
                f"{' or '.join(divergences)}"
            )


def _align_problems(loss: LossConfig, stage: str) -> Iterable[str]:
    align = loss.align
    for name in ALIGN_WEIGHTS:
        if not 0 <= getattr(align, name) < math.inf:
            yield f"loss.align.{name} is {getattr(align, name):g}: must not be negative or infinite"
        if getattr(align, name) and not stage.startswith("mimic"):
            yield f"loss.align.{name}: belongs to the mimic stages, not to {stage}: set it to 0"
    if loss.positions != "auto" and not stage.startswith("mimic"):
        yield f"loss.positions: belongs to the mimic stages, not to {stage}: set it to auto"
    if align.feature_distance != AlignConfig.feature_distance and not align.feature_weight:
        yield "loss.align.feature_distance: no features are compared: remove it, or set loss.align.feature_weight"
    if align.visual_kl_weight and loss.positions == "auto":
        yield (
            "loss.align.visual_kl_weight: positions=auto already distils at image tokens: set loss.positions to "
            "response"
        )
    if align.relation_of == "logits" and not align.relation_weight:
        yield "loss.align.relation_of: no relations are compared: remove it, or set loss.align.relation_weight"
    if align.relation_of == "logits" and align.teacher_lm_head is None:
        yield (
            "loss.align.teacher_lm_head: relations of logits need the teacher's LM head, which caches lack: set it to "
            "the teacher's folder, or loss.align.relation_of to hidden"
        )
    if align.teacher_lm_head is not None and align.relation_of != "logits":
        yield "loss.align.teacher_lm_head: no logits are compared: remove it, or set loss.align.relation_of to logits"


def _number_problems(loss: LossConfig) -> Iterable[str]:
    if loss.unmatched_weight is not None and not 0 <= loss.unmatched_weight < math.inf:
        yield f"loss.unmatched_weight is {loss.unmatched_weight:g}: must not be negative or infinite"
    if loss.importance_max is not None and not loss.importance_max > 0:
        yield f"loss.importance_max is {loss.importance_max:g}: must be above 0"
    for name in ("temperature", "beta"):
        if not 0 < getattr(loss, name) < math.inf:
            yield f"loss.{name} is {getattr(loss, name):g}: must be above 0 and finite"
    not_negative = ("kd_weight", "lm_weight", "visual_weight", "sft_weight", "distill_weight", "router_aux_coef")
    for name in (*not_negative, "desirable_weight", "undesirable_weight"):
        if not 0 <= getattr(loss, name) < math.inf:
            yield f"loss.{name} is {getattr(loss, name):g}: must not be negative or infinite"
    if not 0 <= loss.label_smoothing < 0.5:
        yield f"loss.label_smoothing is {loss.label_smoothing:g}: must be at least 0 and below 0.5"
    for name in ("js_weight", "skew"):
        if not 0 < getattr(loss, name) < 1:
            yield f"loss.{name} is {getattr(loss, name):g}: must be above 0 and below 1"
