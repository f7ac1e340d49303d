"""Packing sequences into the rows of a batch, where those of one sample may share a common prefix.

Chosen and rejected answers follow the same prompt and images. A shared row holds the first sequence, then what follows
the common prefix in each other one; the mask lets each such rest see only that prefix and itself, and its positions
continue from the prefix, so that every token gets the same result as in a row of its own.

Shape suffixes: S sequences, U tokens of the longest, B rows, T columns of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import Ids


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each sequence are: in row `rows_S[s]`, at columns `columns[s]`.

    `mask`: [B, T] of ones and zeros if no row is shared, else [B, 1, T, T]: whether a column (the second T) is seen.
    `first_S`: whether a sequence is the first of its row, which provides the row's images.
    """

    input_ids_BT: Tensor
    mask: Tensor
    rows_S: NDArray[np.int64]
    columns: tuple[Ids, ...]
    first_S: NDArray[np.bool_]

    @property
    def shared(self) -> bool:
        """Whether any row holds several sequences."""
        return self.mask.ndim == 4

    def positions(self, positions_SU: Tensor) -> Tensor:
        """Move the positions of [(3,) S, U] padded sequences to the rows: [(3,) B, T]; 0 at padding."""
        placed_BT = positions_SU.new_zeros((*positions_SU.shape[:-2], *self.input_ids_BT.shape))
        for number, (row, columns_U) in enumerate(zip(self.rows_S, self.columns, strict=True)):
            placed_BT[..., int(row), torch.from_numpy(columns_U)] = positions_SU[..., number, : len(columns_U)]
        return placed_BT


def lay_out(sequences: Sequence[Ids], groups: Sequence[object], *, pad: int, image_token_id: int | None) -> Layout:
    """Pack sequences; neighbours with equal `groups` share a row if their common prefix holds all their images."""
    rows: list[list[Ids]] = []
    shared_by: list[list[int]] = []  # for each piece of each row: the length of the prefix it follows
    rows_S, columns, first_S = [], [], []
    for number, ids in enumerate(sequences):
        prefix = 0
        if number and groups[number] == groups[number - 1]:
            prefix = _common(rows[-1][0], ids)
            if image_token_id is not None and (ids[prefix:] == image_token_id).any():
                prefix = 0
        if not prefix:
            rows.append([])
            shared_by.append([])
        start = sum(len(piece) for piece in rows[-1])
        columns.append(np.r_[np.arange(prefix), start + np.arange(len(ids) - prefix)])
        rows[-1].append(ids[prefix:])
        shared_by[-1].append(prefix)
        rows_S.append(len(rows) - 1)
        first_S.append(not prefix)
    longest = max(sum(len(piece) for piece in row) for row in rows)
    ids_BT = np.full((len(rows), longest), pad, np.int64)
    piece_BT = np.full((len(rows), longest), -1, np.int64)  # which piece of the row; −1 at padding
    shared_BT = np.zeros((len(rows), longest), np.int64)
    for number, (row, shares) in enumerate(zip(rows, shared_by, strict=True)):
        joined, lengths = np.concatenate(row), [len(piece) for piece in row]
        ids_BT[number, : len(joined)] = joined
        piece_BT[number, : len(joined)] = np.repeat(np.arange(len(row)), lengths)
        shared_BT[number, : len(joined)] = np.repeat(shares, lengths)
    if len(rows) == len(sequences):
        mask = torch.from_numpy((piece_BT >= 0).astype(np.int64))
    else:
        column_T = np.arange(longest)
        seen_BTT = piece_BT[:, :, None] == piece_BT[:, None, :]
        seen_BTT |= column_T < shared_BT[:, :, None]
        seen_BTT &= column_T[:, None] >= column_T  # padding sees padding: nothing reads it
        mask = torch.from_numpy(seen_BTT)[:, None]
    return Layout(torch.from_numpy(ids_BT), mask, np.array(rows_S), tuple(columns), np.array(first_S))


def _common(left: Ids, right: Ids) -> int:
    """The length of the common prefix, which leaves at least one token of each."""
    length = min(len(left), len(right)) - 1
    differ = np.flatnonzero(left[:length] != right[:length])
    return int(differ[0]) if len(differ) else length
