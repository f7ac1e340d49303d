"""The gradient of a loss with respect to many rows of logits, as a few numbers per row instead of one per id.

Shape suffixes: N rows, V ids, W ids of a slab, K masked ids, X ids with values of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llavamod_offline.losses.rows import kernels


@dataclass(frozen=True)
class RowGradients:
    """Gradient of id v: scale · exp(logit/T − shift) − per_mass · profile(v), the first term 0 at masked ids, + values.

    `masked_ids_NK`: −1 in empty slots. `ids_NX` ≥ 0 may repeat, and their `values_NX` add up. `profile_V` with its
    factor `per_mass_N` is optional. Numbers are float32, ids int64.
    """

    temperature: float
    shift_N: Tensor
    scale_N: Tensor
    masked_ids_NK: Tensor
    ids_NX: Tensor
    values_NX: Tensor
    per_mass_N: Tensor | None = None
    profile_V: Tensor | None = None

    def times(self, factor: float) -> RowGradients:
        """The same gradients, multiplied by a number."""
        return replace(
            self,
            scale_N=self.scale_N * factor,
            values_NX=self.values_NX * factor,
            per_mass_N=None if self.per_mass_N is None else self.per_mass_N * factor,
        )

    def write_over_exponentials(self, exponentials_NV: Tensor) -> None:
        """Replace exp(logit/T − shift) [N, V], 0 at the masked ids, by the gradient."""
        exponentials_NV.mul_(self.scale_N[:, None])
        if self.per_mass_N is not None and self.profile_V is not None:
            exponentials_NV.addr_(self.per_mass_N, self.profile_V, alpha=-1)
        exponentials_NV.scatter_add_(1, self.ids_NX, self.values_NX)

    def write(self, logits_NW: Tensor, start: int, out_NW: Tensor) -> None:
        """Write the gradient at the ids from `start` on, whose float32 logits are given, to `out_NW` of any dtype.

        `out_NW` may be `logits_NW` itself, which is overwritten in any case.
        """
        if kernels.has_kernels(logits_NW.device):
            kernels.write_gradients(
                logits_NW,
                out_NW,
                start=start,
                temperature=self.temperature,
                shift_N=self.shift_N,
                scale_N=self.scale_N,
                masked_ids_NK=self.masked_ids_NK,
                ids_NX=self.ids_NX,
                values_NX=self.values_NX,
                per_mass_N=self.per_mass_N,
                profile_V=self.profile_V,
            )
            return
        width = logits_NW.shape[1]
        logits_NW.div_(self.temperature).sub_(self.shift_N[:, None]).exp_()
        local_NK, masked_NK = _inside(self.masked_ids_NK, start, width)
        mask_NW = torch.zeros_like(logits_NW, dtype=torch.int8).scatter_add_(1, local_NK, masked_NK.to(torch.int8))
        logits_NW.masked_fill_(mask_NW > 0, 0.0)
        local_NX, inside_NX = _inside(self.ids_NX, start, width)
        profile_V = None if self.profile_V is None else self.profile_V[start : start + width]
        values_NX = torch.where(inside_NX, self.values_NX, 0.0)
        replace(self, ids_NX=local_NX, values_NX=values_NX, profile_V=profile_V).write_over_exponentials(logits_NW)
        if out_NW is not logits_NW:
            out_NW.copy_(logits_NW)


def _inside(ids_NX: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids counted from `start`, clamped to the slab, and whether they really lie in it."""
    local_NX = ids_NX - start
    return local_NX.clamp(0, width - 1), (local_NX >= 0) & (local_NX < width)
