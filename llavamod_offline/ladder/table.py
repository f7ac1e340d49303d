"""What the ladder compares: caches, training runs, the table's rows, and the claims that are tested.

All runs of a group see the same samples in the same number of optimiser steps; every stage on a set takes the same
number. Experts are trained as in mimic_sparse: all MLPs, the routers and the projector, with the rest frozen. What they
add is measured against a dense student whose same parts are trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["align", "sft", "mimic_dense", "mimic_dense_aligned", "mimic_sparse", "preference"]
Column = Literal["accuracy", "pope_f1", "response_hallucination", "object_hallucination", "kl", "calibration_error"]

TEACHER = "teacher"


@dataclass(frozen=True)
class Cache:
    """A cache of a set: what `cache-teacher run` is told besides set and teacher."""

    name: str
    data: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A training run: it starts from the student of `parent`, and reads a set and perhaps a cache of it."""

    name: str
    stage: Stage
    parent: str | None
    data: str
    cache: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableRow:
    """A row of the table: a run's student, and the row that it is compared with."""

    group: str
    name: str
    run: str
    compared_with: str | None = None


@dataclass(frozen=True)
class Claim:
    """One column of two rows. `wants`: the first is higher or lower; or not further from the second than its spread."""

    name: str
    text: str
    column: Column
    row: str
    than: str
    wants: Literal["higher", "lower", "same", "not lower"]


_ALL_IDS = ("capture.preset=exhaustive",)
_TOP_50 = ("capture.top_k=50", "capture.min_prob=0", "capture.tail_samples_max=0")
# One certain id, because a record needs one, and 50 samples of all others: arXiv 2503.16870.
_SAMPLES = ("capture.top_k=1", "capture.tail_samples_max=50", "capture.tail_samples_per_mass=50")
_AT_2 = "capture.temperature=2"

CACHES = (
    *(Cache(name, name) for name in ("general", "multitask")),
    Cache("preference", "preference", ("capture.mismatched=true",)),
    Cache("exhaustive", "general", _ALL_IDS),
    Cache("compact", "general", ("capture.preset=compact",)),
    Cache("top50", "general", (*_TOP_50, "capture.temperatures=[2]")),
    Cache("samples", "general", _SAMPLES),
    Cache("standard-at-2", "general", (_AT_2,)),
    Cache("compact-at-2", "general", ("capture.preset=compact", _AT_2)),
    Cache("samples-at-2", "general", (*_SAMPLES, _AT_2)),
    Cache("blank", "general", ("capture.without_image=blank",)),
    Cache("positions", "general", ("capture.positions=all", "capture.hidden=int8")),
    Cache("unseen", "unseen", _ALL_IDS),
)

_SPARSE = ("student.kind=sparse", "student.upcycle.num_experts=4", "student.upcycle.top_k=2")
_EXPERTS = ("student.capacity_factor=1.5", "loss.router_aux_coef=0.01", "trainable=[projector,mlp,router]")
_GROWN = ("student.upcycle=null",)  # the parent is sparse already
_WITH_ANSWERS = ("loss.kind=kd_lm",)  # as mimic_sparse
_KEPT_LONG = ("loss.distill_weight=0.3",)  # else descriptions get short, because longer ones name more absent objects
_T2, _RENORMALISED = "loss.temperature=2", "loss.tail=renormalised"
_TERM = ("loss.positions=response", "loss.kind=only_kd")


def _term(**weights: float) -> tuple[str, ...]:
    given = {"feature_weight": 0.0, "visual_kl_weight": 0.0, "relation_weight": 0.0, **weights}
    return (*_TERM, *(f"loss.align.{name}={value:g}" for name, value in given.items()))


def _dense(name: str, cache: str, *settings: str) -> Run:
    return Run(name, "mimic_dense", "align", "general", cache, settings)


RUNS = (
    Run("align", "align", None, "align"),
    Run("sft", "sft", "align", "general"),
    Run("sft-dense", "sft", "sft", "multitask"),
    Run("sft-upcycled", "sft", "sft", "multitask", None, (*_SPARSE, *_EXPERTS)),
    Run("sft-experts", "sft", "align", "general", None, (*_SPARSE, *_EXPERTS)),
    Run("sft-sparse", "sft", "sft-experts", "multitask", None, ("student.kind=sparse", *_EXPERTS)),
    _dense("dense", "general"),
    Run("dense-dense", "mimic_dense", "dense", "multitask", "multitask", _WITH_ANSWERS),
    Run("dense-mlp", "mimic_dense", "dense", "multitask", "multitask", (*_WITH_ANSWERS, "trainable=[projector,mlp]")),
    Run("experts", "mimic_sparse", "align", "general", "general"),
    Run("sparse", "mimic_sparse", "experts", "multitask", "multitask", _GROWN),
    Run("dense-sparse", "mimic_sparse", "dense", "multitask", "multitask"),
    Run("dense-sparse-1", "mimic_sparse", "dense", "multitask", "multitask", ("student.upcycle.top_k=1",)),
    *(
        Run(kind, "preference", "dense-sparse", "preference", "preference", (f"loss.kind={kind}", *_KEPT_LONG))
        for kind in ("kto_pair", "sigmoid", "kto")
    ),
    _dense("all-positions", "positions"),
    Run("feature", "mimic_dense_aligned", "align", "general", "positions", _term(feature_weight=1)),
    Run("visual", "mimic_dense_aligned", "align", "general", "positions", _term(visual_kl_weight=1)),
    Run("relation", "mimic_dense_aligned", "align", "general", "positions", _term(relation_weight=0.5)),
    *(_dense(f"weighted-{weight}", "blank", f"loss.visual_weight={weight}") for weight in (1, 4)),
    _dense("exhaustive", "exhaustive"),
    _dense("compact", "compact"),
    _dense("top50", "top50", _RENORMALISED),
    _dense("samples", "samples"),
    _dense("exhaustive-2", "exhaustive", _T2, "loss.tail=bucket"),
    _dense("standard-2", "standard-at-2", _T2),
    _dense("compact-2", "compact-at-2", _T2),
    _dense("top50-2", "top50", _T2, _RENORMALISED),
    _dense("samples-2", "samples-at-2", _T2),
    _dense("reverse", "exhaustive", "loss.divergence=reverse_kl"),
)

_STAGES, _PREFERENCE, _TARGETS, _PARTS = (
    "Stages: general, then multi-task data", "Preference, from dense, then sparse", "Targets: general data alone",
    "Positions, weights and terms: general data alone",
)  # fmt: skip

ROWS = (
    TableRow(_STAGES, "without teacher, dense", "sft-dense"),
    TableRow(_STAGES, "without teacher, sparse", "sft-sparse", "sft-dense"),
    TableRow(_STAGES, "without teacher, dense, then sparse", "sft-upcycled", "sft-dense"),
    TableRow(_STAGES, "distilled, dense", "dense-dense", "sft-dense"),
    TableRow(_STAGES, "distilled, dense, then MLPs alone", "dense-mlp", "sft-dense"),
    TableRow(_STAGES, "distilled, sparse", "sparse", "sft-sparse"),
    TableRow(_STAGES, "distilled, dense, then sparse", "dense-sparse", "sft-upcycled"),
    TableRow(_STAGES, "distilled, dense, then sparse, one expert per token", "dense-sparse-1", "dense-mlp"),
    TableRow(_PREFERENCE, "kto_pair", "kto_pair", "dense-sparse"),
    TableRow(_PREFERENCE, "sigmoid (DPO)", "sigmoid", "dense-sparse"),
    TableRow(_PREFERENCE, "kto", "kto", "dense-sparse"),
    TableRow(_TARGETS, "no teacher", "sft", "exhaustive"),
    TableRow(_TARGETS, "all ids, as of a live teacher", "exhaustive"),
    TableRow(_TARGETS, "standard", "dense", "exhaustive"),
    TableRow(_TARGETS, "compact", "compact", "exhaustive"),
    TableRow(_TARGETS, "top 50, renormalised", "top50", "exhaustive"),
    TableRow(_TARGETS, "50 samples (RS-KD)", "samples", "exhaustive"),
    TableRow(_TARGETS, "all ids, T = 2", "exhaustive-2", "exhaustive"),
    TableRow(_TARGETS, "standard, T = 2", "standard-2", "exhaustive-2"),
    TableRow(_TARGETS, "compact, T = 2", "compact-2", "exhaustive-2"),
    TableRow(_TARGETS, "top 50, renormalised, T = 2", "top50-2", "exhaustive-2"),
    TableRow(_TARGETS, "50 samples, T = 2", "samples-2", "exhaustive-2"),
    TableRow(_TARGETS, "all ids, reverse KL", "reverse", "exhaustive"),
    TableRow(_PARTS, "all positions", "all-positions", "dense"),
    TableRow(_PARTS, "hidden states of answers (LLAVADI)", "feature", "dense"),
    TableRow(_PARTS, "distributions at image tokens (LLaVA-KD)", "visual", "dense"),
    TableRow(_PARTS, "relations between image tokens (LLaVA-KD)", "relation", "dense"),
    TableRow(_PARTS, "weighted by visual advantage, β = 1", "weighted-1", "dense"),
    TableRow(_PARTS, "weighted by visual advantage, β = 4", "weighted-4", "dense"),
)

_HALLUCINATION: Column = "response_hallucination"
_LESS = "a student hallucinates less than"
_NO_CLOSER = "Renormalised top-k brings students no closer to the teacher than"
CLAIMS = (
    Claim("kd_over_sft", "Distillation is more accurate than training without the teacher", "accuracy",
          "dense-dense", "sft-dense", "higher"),
    Claim("two_steps_over_one", "Dense, then sparse is more accurate than sparse from the start", "accuracy",
          "dense-sparse", "sparse", "higher"),
    Claim("sparse_over_dense", "Experts are more accurate than MLPs with as many activated parameters", "accuracy",
          "dense-sparse-1", "dense-mlp", "higher"),
    Claim("preference_below_start", f"After preference distillation, {_LESS} before", _HALLUCINATION,
          "kto_pair", "dense-sparse", "lower"),
    Claim("preference_below_teacher", f"After preference distillation, {_LESS} the teacher", _HALLUCINATION,
          "kto_pair", TEACHER, "lower"),
    Claim("kto_below_dpo", f"After kto_pair, {_LESS} after DPO", _HALLUCINATION, "kto_pair", "sigmoid", "lower"),
    Claim("standard_as_exhaustive", "A standard cache teaches as well as all ids", "kl", "dense", "exhaustive", "same"),
    Claim("compact_as_exhaustive", "A compact cache teaches as well as all ids", "kl", "compact", "exhaustive", "same"),
    Claim("top50_not_below_compact", f"{_NO_CLOSER} compact", "kl", "top50", "compact", "not lower"),
    Claim("top50_not_below_standard", f"{_NO_CLOSER} standard", "kl", "top50", "dense", "not lower"),
)  # fmt: skip
