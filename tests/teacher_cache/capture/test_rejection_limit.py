"""Rejections are grouped by their message and checked against the share that is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.errors import DataError
from teacher_cache.capture.rejection_limit import Rejected, reason_kind
from teacher_cache.format.rejection import Rejection


def too_long(number: int) -> Rejection:
    """One of many rejections of one kind."""
    key = f"llava-{number:04d}"
    return Rejection(key, "response", f"sample '{key}' (response): {300 + number} tokens, more than max_length 200")


def test_reasons_that_differ_in_names_and_numbers_are_of_one_kind() -> None:
    rejected = Rejected()
    rejected.add(10, [too_long(number) for number in range(5)])
    rejected.add(1, [Rejection("a", "chosen", "image 'a': cannot be decoded: broken"), too_long(5)])
    first, second = rejected.reasons()
    assert (first.kind, first.count) == ("N tokens, more than max_length N", 6)
    assert first.keys == ["llava-0000", "llava-0001", "llava-0002"]
    assert first.example == too_long(0).reason
    assert (second.kind, second.count, second.keys) == ("cannot be decoded: broken", 1, ["a"])
    assert rejected.count == 7


def test_a_key_within_a_reason_is_no_part_of_its_kind() -> None:
    kinds = {reason_kind(Rejection(key, "response", f"{key} and {key}: no picture 'x-{key}'")) for key in ("u", "v-9")}
    assert len(kinds) == 1


def test_too_many_rejections_stop_with_the_most_frequent_reason_and_a_key() -> None:
    rejected = Rejected(0.01)
    rejected.add(96, [too_long(number) for number in range(3)])
    rejected.check("caches/c")  # 3 of 99: one in a hundred is allowed, but a hundred have not been seen yet
    rejected.add(1, [Rejection("bad", "response", "image 'bad': cannot be decoded")])
    with pytest.raises(DataError) as stopped:
        rejected.check("caches/c")
    assert str(stopped.value) == (
        "caches/c: 4 of 101 sequences rejected, more than max_rejected=0.01 allows; 3 of them like 'llava-0000' "
        "(sample 'llava-0000' (response): 300 tokens, more than max_length 200); all are in "
        "caches/c/shards/*/rejected.jsonl: correct the set or the settings, or allow more and rerun to resume"
    )


def test_the_first_bad_sample_stops_only_a_run_that_allows_none_or_is_at_its_end() -> None:
    for limit, last, stops in ((0.01, False, False), (0.01, True, True), (0.0, False, True), (None, True, False)):
        rejected = Rejected(limit)
        rejected.add(1, [too_long(0)])
        if stops:
            with pytest.raises(DataError, match="1 of 2 sequences rejected"):
                rejected.check("c", last=last)
        else:
            rejected.check("c", last=last)


@given(st.floats(0, 1), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=20))
def test_at_the_end_the_share_alone_decides(limit: float, shards: list[tuple[int, int]]) -> None:
    rejected = Rejected(limit)
    for captured, bad in shards:
        rejected.add(captured, [too_long(number) for number in range(bad)])
    bad, all_ = sum(bad for _, bad in shards), sum(map(sum, shards))
    if bad > limit * all_:
        with pytest.raises(DataError):
            rejected.check("c", last=True)
    else:
        rejected.check("c", last=True)
