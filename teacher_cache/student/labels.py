"""The labels of a training loop checked against the records that it joins to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llavamod_offline.data.encode.tokenize import UNSUPERVISED
from llavamod_offline.errors import TargetError
from teacher_cache.student.check import check_target_ids

if TYPE_CHECKING:
    from teacher_cache.read.reader import TeacherCache
    from teacher_cache.student.end_of_turn import TokenIdSwap


def check_labels(
    labels: Tensor | Sequence[Tensor],
    items: Sequence[tuple[str, str]],
    cache: TeacherCache,
    *,
    swap: TokenIdSwap | None = None,
) -> None:
    """Refuse labels whose supervised tokens are not those of the records of `items`.

    `labels` [B, T], or B tensors [T], mark unsupervised tokens with −100, as transformers does, and are not shifted.
    `items` are the (key, role) of the B sequences. `swap`: what `check_student` returned for another end of turn.
    Errors: `TargetError` naming the sample and its first difference; `CacheError` if a sample has no record.
    """
    if len(labels) != len(items):
        raise TargetError(f"labels of {len(labels)} sequences for {len(items)} items: pass one (key, role) for each")
    for (key, role), labels_T in zip(items, labels, strict=True):
        supervised_N = torch.as_tensor(labels_T)[torch.as_tensor(labels_T) != UNSUPERVISED]
        check_target_ids(cache, key, role, supervised_N.cpu().numpy().astype("int64"), swap)
