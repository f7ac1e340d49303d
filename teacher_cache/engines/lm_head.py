"""The output layer in float32, without a float32 copy of a half-precision weight on a GPU.

Shape suffixes: R rows, D hidden size, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_VALUES = 2**26


class LmHead:
    """Logits in float32 of rows of hidden states, over the first `vocab_size` ids.

    A float32 weight is used as it is. On a CPU, where casting costs more than the product, any other is copied once.
    On a GPU half-precision rows and weights are multiplied as they are and accumulated in float32, which equals casting
    both; if the device cannot do so, blocks of the weight are cast in turn.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, vocab_size: int) -> None:
        weight_VD = weight_VD.detach()[:vocab_size]
        self.weight_VD = weight_VD.float() if weight_VD.device.type == "cpu" else weight_VD
        self.bias_V = None if bias_V is None else bias_V.detach()[:vocab_size].float()
        self._mixed = self.weight_VD.dtype != torch.float32 and _multiplies_mixed(self.weight_VD)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight_VD.device

    def logits(self, rows_RD: Tensor) -> Tensor:
        """Shapes: [R, D] on the weight's device → [R, V] float32."""
        if self.weight_VD.dtype == torch.float32:
            return torch.nn.functional.linear(rows_RD.float(), self.weight_VD, self.bias_V)
        if self._mixed and rows_RD.dtype == self.weight_VD.dtype:
            logits_RV = torch.mm(rows_RD, self.weight_VD.T, out_dtype=torch.float32)
        else:
            logits_RV = blockwise_logits(rows_RD, self.weight_VD)
        return logits_RV if self.bias_V is None else logits_RV.add_(self.bias_V)


def blockwise_logits(rows_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """Multiply in float32, a block of the weight's rows cast at a time: [R, D], [V, D] → [R, V]."""
    rows_RD = rows_RD.float()
    logits_RV = torch.empty(len(rows_RD), len(weight_VD), device=rows_RD.device)
    step = max(1, _BLOCK_VALUES // weight_VD.shape[1])
    for start in range(0, len(weight_VD), step):
        block = slice(start, start + step)
        torch.mm(rows_RD, weight_VD[block].float().T, out=logits_RV[:, block])
    return logits_RV


def _multiplies_mixed(weight_VD: Tensor) -> bool:
    """Whether the device multiplies in half precision with float32 sums and output."""
    try:
        torch.mm(weight_VD[:1], weight_VD[:1].T, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True
