"""The teacher's LM head in float32.

Shape suffixes: R rows, D hidden size, V ids.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llavamod_offline.models.lm_head import LmHead, float32_products


class Float32Head:
    """Logits in float32 of rows of hidden states, over the first `vocab_size` ids.

    A float32 weight is used as is. On a CPU, where casting costs more than the product, any other is cast once into a
    copy; on a GPU it is not copied, see `float32_products`.
    """

    def __init__(self, head: LmHead, vocab_size: int) -> None:
        head = head.first(vocab_size)
        weight_VD = head.weight_VD.detach()
        bias_V = None if head.bias_V is None else head.bias_V.detach().float()
        self._head = replace(head, weight_VD=weight_VD.float() if weight_VD.is_cpu else weight_VD, bias_V=bias_V)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._head.weight_VD.device

    def logits_of_layer_inputs(self, rows_RD: Tensor) -> Tensor:
        """As `logits`, but for the inputs of the model's LM head layer, which a few models scale before it."""
        return self.logits(rows_RD if self._head.before == 1.0 else rows_RD / self._head.before)

    def logits(self, rows_RD: Tensor) -> Tensor:
        """Shapes: [R, D] on the weight's device → [R, V] float32."""
        weight_VD = self._head.weight_VD
        rows_RD = rows_RD.float() if weight_VD.dtype == torch.float32 else rows_RD
        return self._head.finish_(float32_products(rows_RD, weight_VD))
