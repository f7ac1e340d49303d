"""Ranks as byte streams, and the table of frequent ids."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.errors import CacheError
from teacher_cache.format.id_codes import (
    DIRECT,
    FIRST_FAR,
    decode_ranks,
    encode_ranks,
    frequent_ids,
    ids_by_rank,
    ranks_by_id,
)

EDGES = [0, 1, DIRECT - 1, DIRECT, DIRECT + 255, DIRECT + 256, FIRST_FAR - 1, FIRST_FAR, FIRST_FAR + 255, 2**24 - 1]


@given(st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 2**24 - 1), st.integers(0, 300))))
def test_ranks_come_back(ranks: list[int]) -> None:
    coded = encode_ranks(np.array(ranks, np.int32))
    assert decode_ranks(coded).tolist() == ranks
    assert len(coded.codes) == len(ranks)
    assert len(coded.low) == sum(rank >= DIRECT for rank in ranks)
    assert len(coded.high) == sum(rank >= FIRST_FAR for rank in ranks)


def test_streams_that_do_not_fit_are_refused() -> None:
    coded = encode_ranks(np.array(EDGES, np.int32))
    for change in ({"low": coded.low[1:]}, {"high": coded.high[1:]}):
        with pytest.raises(CacheError, match="for"):
            decode_ranks(dataclasses.replace(coded, **change))


@given(
    st.lists(st.integers(0, 40), max_size=200),
    st.integers(0, 50),
)
def test_ranks_follow_frequency_then_id(ids: list[int], limit: int) -> None:
    table = frequent_ids(np.array(ids, np.int32), 41, limit)
    counts = [ids.count(token) for token in range(41)]
    wanted = sorted((token for token in range(41) if counts[token] > 1), key=lambda token: (-counts[token], token))
    assert table.tolist() == wanted[:limit]
    by_rank = ids_by_rank(table, 41)
    assert by_rank.tolist() == wanted[:limit] + [token for token in range(41) if token not in wanted[:limit]]
    assert by_rank[ranks_by_id(by_rank)].tolist() == list(range(41))


@pytest.mark.parametrize(("table", "problem"), [([3, 3], "duplicates"), ([1, 50], "exceeds"), ([-1], "exceeds")])
def test_a_damaged_table_is_refused(table: list[int], problem: str) -> None:
    with pytest.raises(CacheError, match=problem):
        ids_by_rank(np.array(table, np.int32), 50)
