"""The names of the losses' variants, without torch, so that configurations can import them."""

from __future__ import annotations

from typing import Literal, get_args

DivergenceKind = Literal["forward_kl", "reverse_kl", "js", "skewed_forward_kl", "skewed_reverse_kl", "total_variation"]
TailEstimator = Literal["samples", "bucket", "renormalised"]
PreferenceKind = Literal["kto_pair", "sigmoid", "ipo", "hinge"]
HiddenDistance = Literal["mse", "cosine"]
RelationSource = Literal["hidden", "logits"]
Positions = Literal["auto", "response", "written"]

DIVERGENCE_KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
TAIL_ESTIMATORS: tuple[TailEstimator, ...] = get_args(TailEstimator)
PREFERENCE_KINDS: tuple[PreferenceKind, ...] = get_args(PreferenceKind)
HIDDEN_DISTANCES: tuple[HiddenDistance, ...] = get_args(HiddenDistance)
