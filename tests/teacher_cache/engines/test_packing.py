"""Packing sequences into rows: every token attends to what it would in a row of its own, whatever shares the row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.engines.packing import lay_out

IMAGE = 7
_IDS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
# Groups of sequences: a common prefix, and what follows it in each.
_GROUPS = st.lists(st.tuples(_IDS, st.lists(_IDS, min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(deadline=None)
@given(_GROUPS)
def test_each_sequence_can_be_read_off_its_rows(groups: list[tuple[list[int], list[list[int]]]]) -> None:
    sequences = [np.array(start + rest) for start, rests in groups for rest in rests]
    keys = [number for number, (_, rests) in enumerate(groups) for _ in rests]
    layout = lay_out(sequences, keys, pad=0, image_token_id=IMAGE)
    longest = max(map(len, sequences))
    placed_BT = layout.positions(torch.arange(longest).expand(len(sequences), -1))
    assert layout.first_S[0]
    for number, ids in enumerate(sequences):
        row, columns = layout.rows_S[number], layout.columns[number]
        assert np.array_equal(layout.input_ids_BT[row, columns].numpy(), ids)
        assert np.array_equal(placed_BT[row, columns].numpy(), np.arange(len(ids)))
        mine = np.zeros(layout.input_ids_BT.shape[1], bool)
        mine[columns] = True
        if layout.shared:
            for place, column in enumerate(columns):
                seen_T = layout.mask[row, 0, column].numpy()
                assert np.array_equal(np.flatnonzero(seen_T), columns[: place + 1])
        else:
            assert np.array_equal(layout.mask[row].numpy().astype(bool), mine)
        # The row's images are those of its first sequence, in order.
        if layout.first_S[number]:
            held_T = layout.input_ids_BT[row].numpy() == IMAGE
            assert held_T.sum() == (ids == IMAGE).sum()
    rows = {int(row) for row in layout.rows_S}
    assert len(rows) == layout.first_S.sum() == len(layout.input_ids_BT)
    assert layout.shared == (len(rows) < len(sequences))


def test_rows_are_shared_where_the_beginnings_are() -> None:
    sequences = [np.array(ids) for ids in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [2, 2, 3], [1, 2, 7], [1, 2, 5])]
    layout = lay_out(sequences, [0, 0, 0, 0, 0, 1], pad=0, image_token_id=IMAGE)
    assert layout.rows_S.tolist() == [0, 0, 0, 1, 2, 3]  # another prefix, an image of its own, another group
    assert layout.input_ids_BT.tolist()[0] == [1, 2, 3, 4, 5, 6]
    assert [columns.tolist() for columns in layout.columns[:3]] == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 5]]
    apart = lay_out(sequences, range(6), pad=0, image_token_id=IMAGE)
    assert not apart.shared
    assert apart.mask.sum(1).tolist() == [4, 3, 4, 3, 3, 3]
