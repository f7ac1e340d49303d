"""Steps between codes, and forced ids at the end of heads, against plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.errors import CacheError
from teacher_cache.format.top_k_codes import decode_steps, encode_steps, forced_suffix, missing_forced

HEADS = st.lists(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 65535)), min_size=1, max_size=6), max_size=12)
FORCED = [4, 9, 2]


def _flat(lists: list[list[int]], dtype: type) -> np.ndarray:
    return np.array([value for row in lists for value in row], dtype)


@given(HEADS)
def test_steps_come_back(heads: list[list[int]]) -> None:
    heads = [sorted(head) for head in heads]
    counts = np.array([len(head) for head in heads], np.int32)
    steps = encode_steps(_flat(heads, np.uint16), counts)
    assert decode_steps(steps, counts).tolist() == _flat(heads, np.int64).tolist()
    assert len(steps.near) == sum(len(head) - 1 for head in heads)


def test_steps_of_another_length_are_refused() -> None:
    counts = np.array([2, 3], np.int32)
    steps = encode_steps(np.array([0, 600, 1, 2, 900], np.uint16), counts)
    for change in ({"near": steps.near[1:]}, {"far": steps.far[1:]}):
        with pytest.raises(CacheError, match="for"):
            decode_steps(dataclasses.replace(steps, **change), counts)


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=7, unique=True), max_size=8))
def test_forced_ids_are_split_off_and_found_missing(likely: list[list[int]]) -> None:
    """Whatever a head's likely ids: cutting off the suffix and appending the missing forced ids restores the head."""
    places = np.zeros(13, np.uint8)
    places[FORCED] = [1, 2, 3]
    heads = [head + [token for token in FORCED if token not in head] for head in likely]
    counts = np.array([len(head) for head in heads], np.int32)
    suffix = forced_suffix(_flat(heads, np.int32), counts, places)
    kept = [head[: len(head) - cut] for head, cut in zip(heads, suffix.tolist(), strict=True)]
    assert all(kept)
    missing = missing_forced(_flat(kept, np.int32), np.array([len(k) for k in kept], np.int32), places)
    for head, left, lacks in zip(heads, kept, missing, strict=True):
        assert left + [token for token, lacking in zip(FORCED, lacks, strict=True) if lacking] == head
