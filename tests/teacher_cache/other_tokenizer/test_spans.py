"""Aligning the tokens of two tokenizers: properties that hold on any text, and what is refused."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llavamod_offline.errors import TargetError
from teacher_cache.other_tokenizer.spans import Span, shared_spans
from tests.teacher_cache.other_tokenizer.dense import sequence_of, spans_of
from tests.teacher_cache.other_tokenizer.tokenizers import END, bridge, said

PAIRS = [(teacher, student) for teacher, student in itertools.product(sorted(END), repeat=2) if teacher != student]
TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("the red circle é日本語👩‍🚀🇩🇪\n  ")), max_size=40
)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@settings(max_examples=80, deadline=None)
@given(answers=st.lists(TEXTS, min_size=1, max_size=3))
def test_spans_cover_both_sides_in_order_and_are_the_smallest(teacher: str, student: str, answers: list[str]) -> None:
    ids = (said(teacher, *answers), said(student, *answers))
    found = list(spans_of(bridge(teacher, student), ids))
    for side in ("teacher", "student"):
        at = [getattr(span, side) for span in found]
        assert [start for start, _ in at] == [0, *(stop for _, stop in at[:-1])]
        assert at[-1][1] == len(ids[side == "student"])
    ends = bridge(teacher, student).end_ids
    assert sum(ids[0][span.teacher[1] - 1] == ends[0] for span in found) == len(answers)
    for span in found:
        assert (ids[0][span.teacher[1] - 1] == ends[0]) == (ids[1][span.student[1] - 1] == ends[1])
        texts = [
            span.teacher_before + bridge(teacher, student).teacher.join(ids[0][slice(*span.teacher)]),
            span.student_before + bridge(teacher, student).student.join(ids[1][slice(*span.student)]),
        ]
        ended = ids[0][span.teacher[1] - 1] == ends[0]
        names = (teacher, student)
        said_of = [
            text.removesuffix(END[name].encode() if ended else b"") for text, name in zip(texts, names, strict=True)
        ]
        assert said_of[0].strip() == said_of[1].strip()
        assert not _inner(span, ids, teacher, student)


def _inner(span: Span, ids: tuple[list[int], list[int]], teacher: str, student: str) -> set[int]:
    """Byte offsets inside a span at which both end a token, ignoring white space around the answer."""
    pair, found = bridge(teacher, student), []
    sides = (
        (pair.teacher, span.teacher, span.teacher_before, ids[0]),
        (pair.student, span.student, span.student_before, ids[1]),
    )
    for tokens, (start, stop), before, own in sides:
        heads = [before + tokens.join(own[start:place]) for place in range(start + 1, stop)]
        found.append({len(head) for head in heads if head.strip()})
    return found[0] & found[1]


@given(
    theirs=st.lists(st.integers(0, 20), max_size=12),
    mine=st.lists(st.integers(0, 20), max_size=12),
)
def test_stops_are_where_both_sides_end(theirs: list[int], mine: list[int]) -> None:
    ends = [[*sorted(side), 21] for side in (theirs, mine)]
    stops = shared_spans(*ends)
    assert stops[-1] == (len(ends[0]), len(ends[1]))
    assert all(ends[0][a - 1] == ends[1][b - 1] for a, b in stops)
    assert {ends[0][a - 1] for a, _ in stops} == set(ends[0]) & set(ends[1])


def test_a_space_that_one_template_puts_before_answers_is_no_difference() -> None:
    ids = (said("byte400", " Yes. No."), said("byte300", "Yes. No."))
    first = next(spans_of(bridge("byte400", "byte300"), ids))
    assert (first.teacher_before, first.student_before) == (b"", b" ")
    assert not first.is_single
    bare = list(spans_of(bridge("byte400", "byte300"), (said("byte400", "Yes."), said("byte300", "Yes. \n"))))
    assert bare[-1].student[1] - bare[-1].student[0] > 1  # white space after the answer belongs to its end


def test_texts_that_one_tokenizer_composes_are_aligned() -> None:
    raw = "cafe\u0301 au lait, A\u030angstro\u0308m"
    ids = (said("byte400", unicodedata.normalize("NFC", raw)), said("byte300", raw))
    found = list(spans_of(bridge("byte400", "byte300"), ids))
    assert (found[-1].teacher[1], found[-1].student[1]) == (len(ids[0]), len(ids[1]))
    assert len(found) > 8


def test_other_texts_are_refused_with_the_place_and_the_sample() -> None:
    pair = bridge("byte400", "byte300")
    with pytest.raises(TargetError, match=r"sample 'a' \(response\): from character 4 on, .*'No\.'.*'Yes'"):
        pair.spans(_ids(said("byte400", "Yes No.")), sequence_of(said("byte300", "Yes Yes")))
    with pytest.raises(TargetError, match="the cache has 2 answers, the student 1"):
        pair.spans(_ids(said("byte400", "Yes", "No")), sequence_of(said("byte300", "Yes No")))
    with pytest.raises(TargetError, match="ends its answer with token"):
        pair.spans(_ids(said("byte400", "Yes")[:-1]), sequence_of(said("byte300", "Yes")))


def _ids(ids: list[int]) -> NDArray[np.int64]:
    return sequence_of(ids).target_ids_N
