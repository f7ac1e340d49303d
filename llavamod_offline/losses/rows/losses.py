"""Losses of rows of logits: each in one step, or measured chunk by chunk and planned for all rows together.

Shape suffixes: N positions, C of a chunk, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from llavamod_offline.losses.chunk_gradients import (
    Measured,
    cross_entropy_in_place,
    divergence_in_place,
    measure_cross_entropy,
    measure_divergence,
    plan_cross_entropy,
    plan_divergence,
    zero_metrics,
)
from llavamod_offline.losses.rows.gradients import RowGradients
from llavamod_offline.losses.tail_estimators import PreparedTargets, TailPrior


class RowLoss(Protocol):
    """A loss of N rows of float32 logits."""

    def in_place(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """Replace a chunk's logits by their gradient; return the chunk's summed loss."""


@runtime_checkable
class MeasuredRowLoss(RowLoss, Protocol):
    """A loss that needs only a few numbers from each row, which can be measured before its gradient is written."""

    def measure(self, logits_CV: Tensor, rows: slice) -> Sequence[Measured]:
        """Measure a chunk's logits, which it may overwrite."""

    def plan(self, measured: Sequence[Measured]) -> tuple[Tensor, Sequence[RowGradients]]:
        """The summed loss of all rows, and gradients with respect to the logits, which add up."""


@dataclass(eq=False)
class CrossEntropy:
    """weight · the cross-entropy with the target ids; `loss_sum` adds up what was computed, without `weight`."""

    target_ids_N: Tensor
    weights_N: Tensor | None
    weight: float
    loss_sum: Tensor

    def in_place(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        weights_C = None if self.weights_N is None else self.weights_N[rows]
        loss = cross_entropy_in_place(logits_CV, self.target_ids_N[rows], weight=self.weight, weights_N=weights_C)
        self.loss_sum = self.loss_sum + loss
        return self.weight * loss

    def measure(self, logits_CV: Tensor, rows: slice) -> Sequence[Measured]:
        """See `RowLoss`."""
        return [measure_cross_entropy(logits_CV, self.target_ids_N[rows])]

    def plan(self, measured: Sequence[Measured]) -> tuple[Tensor, Sequence[RowGradients]]:
        """See `RowLoss`."""
        (mine,) = measured
        loss, gradients = plan_cross_entropy(mine, self.target_ids_N, weight=self.weight, weights_N=self.weights_N)
        self.loss_sum = self.loss_sum + loss
        return self.weight * loss, [gradients]


@dataclass(eq=False)
class Distillation:
    """kd_weight · divergence · T² + lm_weight · cross-entropy; sums and `metrics` add up what was computed."""

    teacher: PreparedTargets
    target_ids_N: Tensor
    weights_N: Tensor | None
    prior: TailPrior | None
    kd_weight: float
    lm_weight: float
    divergence_sum: Tensor
    cross_entropy_sum: Tensor
    metrics: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = zero_metrics(self.divergence_sum.device)

    def in_place(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        divergence, cross_entropy = divergence_in_place(
            logits_CV,
            self.teacher[rows],
            self.metrics,
            kd_weight=self.kd_weight,
            lm_weight=self.lm_weight,
            target_ids_N=self.target_ids_N[rows],
            weights_N=None if self.weights_N is None else self.weights_N[rows],
            prior=self.prior,
        )
        return self._added(divergence, cross_entropy)

    def measure(self, logits_CV: Tensor, rows: slice) -> Sequence[Measured]:
        """See `RowLoss`."""
        target_ids_C = self.target_ids_N[rows]
        apart = [measure_cross_entropy(logits_CV, target_ids_C)] if self._has_two_softmaxes else []
        return [*apart, measure_divergence(logits_CV, self.teacher[rows], target_ids_C)]

    def plan(self, measured: Sequence[Measured]) -> tuple[Tensor, Sequence[RowGradients]]:
        """See `RowLoss`."""
        gradients = []
        apart = torch.zeros_like(self.cross_entropy_sum)
        if self._has_two_softmaxes:
            apart, gradient = plan_cross_entropy(
                measured[0], self.target_ids_N, weight=self.lm_weight, weights_N=self.weights_N
            )
            gradients.append(gradient)
        divergence, cross_entropy, gradient = plan_divergence(
            measured[-1],
            self.teacher,
            self.metrics,
            kd_weight=self.kd_weight,
            lm_weight=0.0 if self._has_two_softmaxes else self.lm_weight,
            target_ids_N=self.target_ids_N,
            weights_N=self.weights_N,
            prior=self.prior,
        )
        return self._added(divergence, apart + cross_entropy), [*gradients, gradient]

    @property
    def _has_two_softmaxes(self) -> bool:
        return bool(self.lm_weight) and self.teacher.temperature != 1.0

    def _added(self, divergence: Tensor, cross_entropy: Tensor) -> Tensor:
        self.divergence_sum = self.divergence_sum + divergence
        self.cross_entropy_sum = self.cross_entropy_sum + cross_entropy
        return self.kd_weight * divergence + self.lm_weight * cross_entropy
