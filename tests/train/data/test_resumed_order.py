"""Sample numbers: samples that stay keep theirs, whatever is removed, added, or moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.errors import ModelError
from train.data.resumed_order import SAMPLES_NAME, number_samples, read_hashes, write_hashes

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30, unique=True)


@given(first=KEYS, others=KEYS, seed=st.randoms(use_true_random=False))
def test_a_sample_keeps_its_number_for_good(first: list[int], others: list[int], seed: st.DataObject) -> None:
    table = np.array(first, np.uint64)
    known = dict(zip(first, range(len(first)), strict=True))
    for round_number in range(3):
        now = list(dict.fromkeys([*first[round_number:], *others[: 3 * round_number]]))
        seed.shuffle(now)  # type: ignore[attr-defined]
        if not now:
            return
        numbers, table = number_samples(table, np.array(now, np.uint64))
        assert len(set(numbers.tolist())) == len(now)
        for key, number in zip(now, numbers.tolist(), strict=True):
            assert known.setdefault(key, number) == number
            assert int(table[number]) == key


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert read_hashes(tmp_path) is None
    write_hashes(tmp_path, np.arange(5, dtype=np.uint64))
    assert read_hashes(tmp_path).tolist() == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    (tmp_path / SAMPLES_NAME).write_bytes((tmp_path / SAMPLES_NAME).read_bytes()[:-4])
    with pytest.raises(ModelError, match=f"^{tmp_path}/{SAMPLES_NAME}: damaged"):
        read_hashes(tmp_path)
