"""Which prediction answers which question."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.example import Example, first_line_key
from eval.join import join
from eval.predictions import Prediction
from llavamod_offline.errors import EvalError

EXAMPLES = [
    Example("1", "P", None, aliases=("1",)),
    Example("2", "P", None, aliases=("2",)),
    Example("x#1", "What?\nSuffix", None, aliases=("x",), question="what?"),
    Example("x#2", "Who?\nSuffix", None, aliases=("x",), question="who?"),
]


def joined(*predictions: Prediction, allow_missing: bool = False) -> dict[str, str]:
    found = join(EXAMPLES, predictions, question_key=first_line_key, path=Path("p.jsonl"), allow_missing=allow_missing)
    return {name: prediction.text for name, prediction in found.items()}


def ours(name: str, text: str = "") -> Prediction:
    return Prediction(text or name, "P", name, task="t")


def theirs(name: str, prompt: str = "P", text: str = "") -> Prediction:
    return Prediction(text or name, prompt, question_id=name)


def test_ours_are_matched_by_id_in_any_order() -> None:
    assert joined(ours("x#2"), ours("2"), ours("1"), ours("x#1")) == {n: n for n in ("1", "2", "x#1", "x#2")}


@pytest.mark.parametrize("text", ["red\n", "\tred", "  red \r\n", "red"])
def test_white_space_around_an_answer_is_no_part_of_it(text: str) -> None:
    found = joined(ours("1", text), theirs("2", text=text), allow_missing=True)
    assert found == {"1": "red", "2": "red"}


def test_llavas_are_matched_by_question_id_and_where_it_is_shared_by_their_question() -> None:
    found = joined(
        theirs("x", "WHO?\nanother suffix", "b"), theirs("2"), theirs("1"), theirs("x", "<image>\nWhat?", "a")
    )
    assert found == {"1": "1", "2": "2", "x#1": "a", "x#2": "b"}


def test_missing_ids_are_listed_and_allowed_on_request() -> None:
    with pytest.raises(EvalError, match=r"3 questions \('2', 'x#1', 'x#2'\) without a prediction"):
        joined(ours("1"))
    assert joined(ours("1"), allow_missing=True) == {"1": "1"}


def test_only_the_first_five_are_listed() -> None:
    with pytest.raises(
        EvalError, match=r"7 predictions \('u0', 'u1', 'u2', 'u3', 'u4', …\) without a matching question"
    ):
        joined(*(ours(f"u{number}") for number in range(7)), allow_missing=True)


def test_duplicates_are_errors_in_both_forms() -> None:
    with pytest.raises(EvalError, match=r"1 prediction \('2'\) duplicating an earlier one"):
        joined(ours("2"), ours("2"), allow_missing=True)
    with pytest.raises(EvalError, match=r"1 prediction \('x'\) duplicating an earlier one"):
        joined(theirs("x", "Who?"), theirs("x", "who? \n…"), allow_missing=True)


def test_an_unknown_question_of_a_shared_id_is_unknown() -> None:
    with pytest.raises(EvalError, match=r"1 prediction \('x'\) without a matching question"):
        joined(theirs("x", "Where?"), allow_missing=True)


def test_our_ids_are_no_aliases() -> None:
    with pytest.raises(EvalError, match="without a matching question"):
        joined(ours("x"), allow_missing=True)


def test_a_shared_id_needs_the_prompt() -> None:
    with pytest.raises(EvalError, match="'x': has no 'prompt', and several questions share its question_id"):
        joined(theirs("x", ""), allow_missing=True)
    assert joined(theirs("1", ""), allow_missing=True) == {"1": "1"}


def test_unanswerable_questions_are_not_missing() -> None:
    found = join(
        EXAMPLES, [ours("1"), ours("2")], question_key=first_line_key, path=Path("p"), unanswerable=["x#1", "x#2"]
    )
    assert sorted(found) == ["1", "2"]


def test_a_runner_that_numbers_questions_in_its_own_way_is_not_matched_by_number() -> None:
    numbered = [
        Example("1", "Is there a dog?\nAnswer.", None, aliases=("1",)),
        Example("2", "Is there a cat?\nAnswer.", None, aliases=("2",)),
    ]

    def scored(*asked: tuple[str, str]) -> list[str]:
        given = [Prediction("Yes", text, question_id=name, question=text) for name, text in asked]
        return sorted(join(numbered, given, question_key=first_line_key, path=Path("p"), allow_missing=True))

    assert scored(("1", "Is there a DOG?"), ("2", "Is there  a cat?")) == ["1", "2"]
    with pytest.raises(EvalError, match=r"1 prediction \('2'\) without a matching question"):
        scored(("2", "Is there a dog?"))
