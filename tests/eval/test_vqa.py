"""VQA accuracy, quirk by quirk. Source of every case: llava/eval/m4c_evaluator.py (MMF's EvalAIAnswerProcessor)."""

from __future__ import annotations

import itertools

import pytest

from eval.vqa import accuracy, normalise


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes", "yes"),
        # word_tokenize: "," and "?" go, "'s" gets a space, so that contractions with it are never found
        ("1,000", "1000"),
        ("really?", "really"),
        ("St. John's", "st john 's"),
        ("let's go", "let 's go"),
        ("somebodys", "somebody's"),
        # __call__: line breaks and tabs are spaces
        ("a\nred\tcar", "red car"),
        # process_punctuation: deleted beside a space, a space elsewhere; decided once for the whole text
        ("well-known", "well known"),
        ("well- known", "well known"),
        ("a-b - c-d", "ab cd"),
        ("rock/pop", "rock pop"),
        ("$5", "$5"),
        ("5!", "5"),
        ("(left)", "left"),
        # PERIOD_STRIP's look-behind is a typo, so the period after a digit goes too unless a digit follows
        ("3.", "3"),
        ("1.5", "1.5"),
        (".5", ".5"),
        ("www.foo.com", "wwwfoocom"),
        # re.UNICODE lands in `count`: 32 periods at most
        ("x" + "." * 40, "x" + "." * 8),
        # process_digit_article: numbers to ten, articles, contractions
        ("None", "0"),
        ("zero two ten eleven", "0 2 10 eleven"),
        ("The cat and a dog", "cat and dog"),
        ("A", ""),
        ("the", ""),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("", ""),
        ("  Two  Dogs ", "2 dogs"),
    ],
)
def test_normalise(answer: str, normalised: str) -> None:
    assert normalise(answer) == normalised


def test_accuracy_is_leave_one_out() -> None:
    """0, .3, .6, .9, 1: not min(k/3, 1), which would give .333 and .667 for one and two."""
    for agreeing, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        references = ["cat"] * agreeing + [f"other{number}" for number in range(10 - agreeing)]
        assert accuracy("cat", references) == pytest.approx(expected)


def test_accuracy_equals_the_mean_over_left_out_answers() -> None:
    for agreeing, count in itertools.product(range(11), (1, 2, 3, 10)):
        if agreeing > count:
            continue
        references = ["cat"] * agreeing + [f"other{number}" for number in range(count - agreeing)]
        slow = []
        for left_out in range(count):
            others = [answer for number, answer in enumerate(references) if number != left_out]
            slow.append(min(1.0, others.count("cat") / 3))
        assert accuracy("cat", references) == pytest.approx(sum(slow) / count)


def test_human_answers_are_normalised_too() -> None:
    assert accuracy(normalise("A"), ["the"] * 10) == 1.0
    assert accuracy(normalise("2."), ["Two"] * 10) == 1.0
