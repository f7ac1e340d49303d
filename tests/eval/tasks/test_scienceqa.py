"""ScienceQA. Source: llava/eval/eval_science_qa.py; the question file llava_test_CQM-A.json."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.example import Example
from eval.score import score_task
from eval.tasks import scienceqa
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import answers, science_root, scored, write_json, write_jsonl

LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("E", "E"),
        ("F", None),
        ("b", None),
        ("B. y", "B"),
        ("B.", None),  # three characters at least
        ("B.y", None),
        ("B) y", None),
        (" B", None),
        ("The answer is B.", "B"),
        ("The answer is B", None),  # the unescaped "." requires one more character
        ("I think. The answer is C because", "C"),
        ("The answer is A. The answer is B.", None),  # exactly once
        ("The answer is Z.", "Z"),
        ("", None),
        ("AB", None),
    ],
)
def test_parse(text: str, letter: str | None) -> None:
    assert scienceqa.parse(text) == letter


@given(
    st.lists(st.sampled_from([*"ABEFa. \n", "The answer is ", "The answer is B", "the answer is A."]), max_size=5),
    st.integers(2, 5),
)
def test_the_chosen_option_equals_the_official_steps(pieces: list[str], choices: int) -> None:
    """eval_science_qa.py: parse, then the letter's index among the available choices, else -1: never a guess."""
    text, options = "".join(pieces), ["A", "B", "C", "D", "E"]
    found = re.findall("The answer is ([A-Z])[^\n]", text)
    if text in options:
        letter = text
    elif len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        letter = text[0]
    else:
        letter = found[0] if len(found) == 1 else "FAILED"
    index = options.index(letter) if letter in options[:choices] else -1
    for right in range(choices):
        example = Example("1", "Q", scienceqa.ScienceQaReference(right, choices, True))
        assert scienceqa.score([example], {"1": text}).metrics["img_accuracy"] == float(index == right)


def test_accuracies_and_prompts(tmp_path: Path) -> None:
    root = science_root(tmp_path)
    result = scored(scienceqa, root, {"4": "B", "5": "B. y", "11": "The answer is C."})
    assert result.metrics == pytest.approx({"img_accuracy": 0.5, "accuracy": 2 / 3, "text_accuracy": 1.0})
    examples = {example.id: example for example in scienceqa.load(root)}
    assert examples["4"].prompt == "Context: c\nQuestion 4?\nA. x\nB. y\nC. z" + LETTER
    assert examples["4"].source is not None
    assert examples["11"].source is None


def test_a_letter_beyond_the_choices_is_wrong_and_never_a_guess(tmp_path: Path) -> None:
    root = science_root(tmp_path)
    for letter in ("D", "E", "The answer is Z."):
        result = scored(scienceqa, root, dict.fromkeys(("4", "5", "11"), letter))
        assert result.metrics["accuracy"] == 0.0
        assert result.n_unparsed == 0


def test_a_missing_answer_stays_a_question_with_an_image(tmp_path: Path) -> None:
    """The official script takes the image from the answer's prompt, so a missing one leaves the set."""
    root = science_root(tmp_path / "data")
    path = write_jsonl(tmp_path / "a.jsonl", answers({"4": "B", "11": "C"}, {"4": "<image>\nQ", "11": "Q"}))
    with pytest.raises(EvalError, match=r"1 question \('5'\) without a prediction"):
        score_task("scienceqa", root, path)
    score = score_task("scienceqa", root, path, allow_missing=True)
    assert score.metrics["img_accuracy"] == 0.5
    assert score.n_missing == 1


def test_the_three_files_must_agree(tmp_path: Path) -> None:
    root = science_root(tmp_path)
    write_json(root / "scienceqa" / "pid_splits.json", {"test": ["4", "5", "11", "12"]})
    with pytest.raises(EvalError, match="lacks 1 question of the test split, first '12'"):
        scienceqa.load(root)
    write_json(root / "scienceqa" / "pid_splits.json", {"test": ["4", "5"]})
    with pytest.raises(EvalError, match="item 3: question '11' is not in the test split"):
        scienceqa.load(root)
    write_json(root / "scienceqa" / "pid_splits.json", {"val": []})
    with pytest.raises(EvalError, match="field 'test' must be a list of strings"):
        scienceqa.load(root)
