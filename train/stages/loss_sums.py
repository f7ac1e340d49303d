"""Losses and log values summed over a micro-batch's units, and their combination into those of a step.

A unit is a supervised position (align, sft, mimic) or a pair (preference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from train.engine.deepspeed_engine import World


@dataclass(frozen=True)
class LossSums:
    """A micro-batch's sums. `loss` is a scalar with gradient; all else is detached.

    `means`: scalars summed over the units, which the log divides by the step's count. `totals`: tensors summed over
    the step without division. `spreads`: values whose distribution over the step is logged.
    """

    loss: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepSums:
    """The sums of an optimiser step: means divided by the count, totals, and all values of each spread."""

    loss: float
    means: dict[str, float]
    totals: dict[str, Tensor]
    spreads: dict[str, Tensor]


def combine(parts: Sequence[LossSums], count: float, world: World) -> StepSums:
    """Sum the micro-batches of all processes and divide once by `count`, the units of the step."""
    first = parts[0]
    losses = torch.stack([part.loss.detach().double() for part in parts]).sum()
    means = {name: torch.stack([p.means[name].detach().double() for p in parts]).sum() for name in first.means}
    totals = {name: torch.stack([p.totals[name].detach().double() for p in parts]).sum(0) for name in first.totals}
    pieces = (losses, *means.values(), *totals.values())
    flat = world.sum(torch.cat([piece.reshape(-1) for piece in pieces])).cpu()
    loss, *mean_values = (flat[: 1 + len(means)] / count).tolist()
    sizes = [total.numel() for total in totals.values()]
    return StepSums(
        loss=loss,
        means=dict(zip(means, mean_values, strict=True)),
        totals={
            name: piece.view(totals[name].shape)
            for name, piece in zip(totals, flat[1 + len(means) :].split(sizes), strict=True)
        },
        spreads={name: world.gather(torch.cat([p.spreads[name].detach() for p in parts])) for name in first.spreads},
    )


def spread_entry(values: Tensor) -> dict[str, float]:
    """Return mean, extremes and quantiles of a step's values for the log."""
    points = torch.quantile(values.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    names = ("mean", "min", "p10", "p50", "p90", "max")
    numbers = (float(values.double().mean()), float(values.min()), *points, float(values.max()))
    return dict(zip(names, numbers, strict=True))
