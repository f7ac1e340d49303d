"""Losses and log values summed over a micro-batch's units and tokens, and their combination into a step's.

A unit is a supervised position (align, sft, mimic) or a pair (preference); tokens are all except padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from train.engine.deepspeed_engine import World


@dataclass(frozen=True)
class LossSums:
    """A micro-batch's sums. `loss` and `token_loss` are scalars with gradient; all else is detached.

    `loss` and `means`, scalars, are sums over the units, which a step divides by its units. `token_loss` and
    `token_means`, tensors, are sums over the tokens, which a step divides by its tokens. `spreads`: values whose
    distribution over the step is logged.
    """

    loss: Tensor
    token_loss: Tensor | None = None
    means: dict[str, Tensor] = field(default_factory=dict)
    token_means: dict[str, Tensor] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(default_factory=dict)

    def share(self, units: float, tokens: float) -> Tensor:
        """This micro-batch's share of the loss of a step with that many units and tokens."""
        own = self.loss / units
        return own if self.token_loss is None else own + self.token_loss / tokens

    def detach(self) -> LossSums:
        """The same sums without gradient."""
        token_loss = None if self.token_loss is None else self.token_loss.detach()
        return replace(self, loss=self.loss.detach(), token_loss=token_loss)


@dataclass(frozen=True)
class StepSums:
    """An optimiser step: its loss, its means over units and over tokens, and all values of each spread."""

    loss: float
    means: dict[str, float]
    token_means: dict[str, Tensor]
    spreads: dict[str, Tensor]


def combine(parts: Sequence[LossSums], units: float, tokens: float, world: World) -> StepSums:
    """Sum the micro-batches of all processes and divide once by the units or the tokens of the step."""
    first = parts[0]
    sums = {"loss": torch.stack([part.detach().share(units, tokens).double() for part in parts]).sum()}
    for name in first.means:
        sums[f"means {name}"] = torch.stack([part.means[name].double() for part in parts]).sum() / units
    for name in first.token_means:
        sums[f"token_means {name}"] = torch.stack([part.token_means[name].double() for part in parts]).sum(0) / tokens
    flat = world.sum(torch.cat([value.detach().reshape(-1) for value in sums.values()])).cpu()
    pieces = flat.split([value.numel() for value in sums.values()])
    found = {name: piece.view(value.shape) for (name, value), piece in zip(sums.items(), pieces, strict=True)}
    return StepSums(
        loss=float(found["loss"]),
        means={name: float(found[f"means {name}"]) for name in first.means},
        token_means={name: found[f"token_means {name}"] for name in first.token_means},
        spreads={name: world.gather(torch.cat([p.spreads[name].detach() for p in parts])) for name in first.spreads},
    )


def spread_entry(values: Tensor) -> dict[str, float]:
    """Return mean, extremes and quantiles of a step's values for the log."""
    points = torch.quantile(values.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    names = ("mean", "min", "p10", "p50", "p90", "max")
    numbers = (float(values.double().mean()), float(values.min()), *points, float(values.max()))
    return dict(zip(names, numbers, strict=True))
