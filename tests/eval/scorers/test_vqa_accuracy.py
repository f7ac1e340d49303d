"""VQA accuracy, quirk by quirk. Source of every case: llava/eval/m4c_evaluator.py (MMF's EvalAIAnswerProcessor)."""

from __future__ import annotations

import hashlib
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scorers import vqa_accuracy as vqa
from eval.scorers.vqa_accuracy import accuracy, normalise


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
        # process_punctuation: deleted if beside a space, else replaced by one; decided once for the whole text
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
        ("I'dve", "i'dve"),  # keys with a capital letter are never found either
        ("she's", "she 's"),
        ("a,b", "ab"),
        ("1-2", "1 2"),
        ("x_y", "x y"),
        ("x _y", "x y"),
        ("none!", "0"),
        ("ten.", "10"),
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


def test_the_tables_are_complete() -> None:
    """Against the tables of m4c_evaluator.py: hashes of their reachable entries, one word and its replacement per line.

    Unreachable are contractions with a capital or "'s" in the key, and "let's" and "she's", which stay unchanged.
    """
    reachable = {word: found for word, found in vqa._CONTRACTIONS.items() if "'s" not in word}
    table = "\n".join(f"{word} {found}" for word, found in sorted(reachable.items()))
    assert len(reachable) == 112
    assert (
        hashlib.sha256(table.encode()).hexdigest() == "1769f3aa27382f4e68903f4d30f801c64f920379dc4ff0caea7ae29d482ce2b2"
    )
    assert list(vqa._NUMBERS.values()) == ["0", *map(str, range(11))]
    assert [*vqa._PUNCTUATION] == list(';/[]"{}()=+\\_-><@`,?!')
    assert len(set(vqa._PUNCTUATION)) == 21
    assert {"a", "an", "the"} == vqa._ARTICLES


PIECES = (
    *(
        "St. John's",
        "1,000",
        "a",
        "An",
        "THE",
        "none",
        "Two",
        "dont",
        "couldnt've",
        "'ow'sat",
        "3.",
        "1.5",
        ".",
        "..",
        "x",
    ),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "'", "'s", "%", "é", "İ", "ß", "٣", *vqa._PUNCTUATION),
)


def slowly(answer: str) -> str:
    """The five steps of the module's docstring, one after the other, without shortcuts."""
    text = "".join(letter for letter in answer.lower() if letter not in ",?").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()
    digits_around_a_comma = re.search(r"\d,+\d", text) is not None
    cleaned = text
    for mark in vqa._PUNCTUATION:
        escaped = re.escape(mark)
        deleted = digits_around_a_comma or re.search(f"{escaped} | {escaped}", text) is not None
        cleaned = re.sub(escaped, "" if deleted else " ", cleaned)
    kept, removed = "", 0
    for place, letter in enumerate(cleaned):
        followed = re.match(r"\d", cleaned[place + 1 : place + 2]) is not None
        if letter == "." and not followed and removed < 32:
            removed += 1
        else:
            kept += letter
    words = [vqa._NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(vqa._CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20))
def test_normalise_equals_its_slow_steps(answer: str) -> None:
    assert normalise(answer) == slowly(answer)


@given(st.lists(st.sampled_from(["cat", "Cat.", "the dog", "two", "2", "", "A"]), min_size=10, max_size=10))
def test_accuracy_equals_the_official_loop(references: list[str]) -> None:
    """Every human answer is left out once; agreement with the other nine counts."""
    for answer in ("cat", "dog", "2", "", "bird"):
        shares = []
        for left_out in range(10):
            others = [normalise(reference) for place, reference in enumerate(references) if place != left_out]
            shares.append(min(1.0, others.count(answer) / 3))
        assert accuracy(answer, references) == pytest.approx(sum(shares) / 10)
