"""POPE. Sources: llava/eval/eval_pope.py; POPE #17 and LLaVA #626 (label order); the published data's "imange"."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.files import read_jsonl
from eval.score import score_task
from eval.tasks import pope
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import answers, pope_root, scored, write_jsonl


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("No, there is not.", "no"),
        ("Yes. There is no dog", "yes"),  # the text before the first "."
        (".No", "yes"),
        ("It is not there", "no"),
        ("no,", "no"),  # commas are deleted
        ("", "yes"),
        ("NO", "yes"),  # exactly "No", "not" or "no"
        ("nope", "yes"),
        ("no\n", "yes"),  # split at single spaces only
        ("There is  no dog", "no"),
        ("None", "yes"),
    ],
)
def test_parse(text: str, read_as: str) -> None:
    assert pope.parse(text) == read_as


@given(st.lists(st.sampled_from(["No", "no", "not", "NO", "Yes", "yes", "nope", " ", "  ", ",", ".", "\n", "n", "o"])))
def test_parse_equals_the_official_steps(pieces: list[str]) -> None:
    """eval_pope.py: cut at the first period, if any, delete commas, split at each space, look for a word."""
    text = "".join(pieces)
    sentence = text[: text.index(".")] if "." in text else text
    words: list[str] = []
    word = ""
    for letter in sentence.replace(",", "") + " ":
        words, word = ([*words, word], "") if letter == " " else (words, word + letter)
    assert pope.parse(text) == ("no" if "No" in words or "not" in words or "no" in words else "yes")


def test_metrics_equal_the_official_sums(tmp_path: Path) -> None:
    rng = random.Random(1)
    labels = [rng.choice(("yes", "no")) for _ in range(50)]
    root = pope_root(tmp_path, labels)
    texts = {example.id: rng.choice(("Yes", "No", "no, sir", "NO", "It is not.")) for example in pope.load(root)}
    metrics, f1s = scored(pope, root, texts).metrics, []
    for index, category in enumerate(pope.CATEGORIES):
        said = [texts[str(index * 50 + number + 1)] in ("Yes", "NO") for number in range(50)]
        pairs = list(zip(said, (label == "yes" for label in labels), strict=True))
        tp, fp = pairs.count((True, True)), pairs.count((True, False))
        tn, fn = pairs.count((False, False)), pairs.count((False, True))
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        f1s.append(2 * precision * recall / (precision + recall))
        assert metrics[f"f1_{category}"] == pytest.approx(f1s[-1])
        assert metrics[f"accuracy_{category}"] == pytest.approx((tp + tn) / 50)
        assert metrics[f"precision_{category}"] == pytest.approx(precision)
        assert metrics[f"recall_{category}"] == pytest.approx(recall)
        assert metrics[f"yes_ratio_{category}"] == pytest.approx(sum(said) / 50)
    assert metrics["f1_mean"] == pytest.approx(sum(f1s) / 3)


def test_scores_against_counts_by_hand(tmp_path: Path) -> None:
    """Labels yes, no, yes, no, no; answers yes, yes, no, no, no → TP 1, FP 1, FN 1, TN 2."""
    root = pope_root(tmp_path, ("yes", "no", "yes", "no", "no"))
    one = ["Yes", "Yes", "No", "No", "Nothing is not there"]
    texts = dict(zip(map(str, range(1, 16)), [*one, *one, "Yes", "No", "Yes", "No", "No"], strict=True))
    result = scored(pope, root, texts)
    assert result.metrics["f1_adversarial"] == pytest.approx(0.5)
    assert result.metrics["precision_adversarial"] == pytest.approx(0.5)
    assert result.metrics["recall_adversarial"] == pytest.approx(0.5)
    assert result.metrics["accuracy_adversarial"] == pytest.approx(0.6)
    assert result.metrics["yes_ratio_adversarial"] == pytest.approx(0.4)
    assert result.metrics["f1_random"] == 1.0
    assert result.metrics["f1_mean"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert result.metrics["accuracy"] == pytest.approx(11 / 15)
    assert result.metrics["yes_ratio"] == pytest.approx(6 / 15)  # share of the answers, not of the labels
    assert result.verdicts["2"].right == 0.0
    assert result.verdicts["2"].read_as == "yes"


def test_labels_are_joined_by_content_not_by_order(tmp_path: Path) -> None:
    root = pope_root(tmp_path, ("yes", "no", "no", "yes", "yes", "no"))
    rng = random.Random(0)
    for category in pope.CATEGORIES:
        path = root / "pope" / "coco" / f"coco_pope_{category}.json"
        rows = [row.values for row in read_jsonl(path)]
        extra = {"question_id": 99, "image": "other.jpg", "text": "Is there a cat in the image?", "label": "no"}
        rng.shuffle(rows)
        write_jsonl(path, [extra, *rows])
    truth = {e.id: "Yes" if e.reference.yes else "No" for e in pope.load(root)}
    assert scored(pope, root, truth).metrics["f1_mean"] == 1.0
    assert [truth[str(n)] for n in range(1, 7)] == ["Yes", "No", "No", "Yes", "Yes", "No"]


def test_a_models_that_says_one_thing_alone_divides_nothing_by_zero(tmp_path: Path) -> None:
    root = pope_root(tmp_path, ("no", "no"))
    names = [str(number) for number in range(1, 7)]
    assert scored(pope, root, dict.fromkeys(names, "No")).metrics["f1_mean"] == 0.0
    assert scored(pope, root, dict.fromkeys(names, "Yes")).metrics["precision"] == 0.0


def test_undecided_answers_are_yes_and_counted(tmp_path: Path) -> None:
    root = pope_root(tmp_path, ("yes",))
    result = scored(pope, root, {"1": "A dog", "2": "", "3": "YES!"})
    assert result.n_unparsed == 2
    assert result.metrics["accuracy"] == 1.0


def test_a_missing_answer_is_wrong_whatever_the_label(tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data", ("yes", "no"))
    path = write_jsonl(tmp_path / "answers.jsonl", answers({1: "Yes", 2: "No"}))
    with pytest.raises(EvalError, match=r"4 questions .* without a prediction"):
        score_task("pope", root, path)
    score = score_task("pope", root, path, allow_missing=True)
    assert (score.n, score.n_missing) == (6, 4)
    assert score.metrics["accuracy"] == pytest.approx(2 / 6)
    assert score.metrics["accuracy_popular"] == 0.0
    assert "4 missing answers counted as wrong" in score.protocol


def test_misspelt_questions_find_their_label(tmp_path: Path) -> None:
    root = pope_root(tmp_path, ("yes",))
    path = root / "pope" / "llava_pope_test.jsonl"
    path.write_text(path.read_text().replace("in the image?", "in the imange?"))
    assert scored(pope, root, {"1": "Yes", "2": "Yes", "3": "Yes"}).metrics["accuracy"] == 1.0


def test_bad_benchmark_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no such folder"):
        pope.load(tmp_path / "nowhere")
    with pytest.raises(EvalError, match=r"llava_pope_test.jsonl: put the benchmark's files there"):
        pope.load(tmp_path)
    root = pope_root(tmp_path, ("yes", "no"))
    labels = root / "pope" / "coco" / "coco_pope_random.json"
    good = labels.read_text()
    labels.write_text(good.replace('"label": "no"', '"label": "perhaps"'))
    with pytest.raises(EvalError, match=r"coco_pope_random.json: line 2: label 'perhaps'"):
        pope.load(root)
    labels.write_text(good + json.dumps({**json.loads(good.splitlines()[0]), "label": "no"}) + "\n")
    with pytest.raises(EvalError, match=r"line 3: contradicts an earlier label"):
        pope.load(root)
    labels.write_text(good.splitlines()[0] + "\n")
    with pytest.raises(EvalError, match=r"line 6: no label for 'Is there a dog1 in the image\?'"):
        pope.load(root)
    questions = root / "pope" / "llava_pope_test.jsonl"
    first = json.loads(questions.read_text().splitlines()[0])
    write_jsonl(questions, [{**first, "text": ""}])
    with pytest.raises(EvalError, match=r"line 1: no label for '' of COCO"):
        pope.load(root)
    questions.write_text(json.dumps({**first, "text": "\ud800", "more": "\U0001f600"}) + "\n")
    with pytest.raises(EvalError, match=r"line 1: not readable as JSON: .*surrogates not allowed"):
        pope.load(root)
    write_jsonl(questions, [{**first, "category": "random"}])
    labels.write_text("[not json\n")
    with pytest.raises(EvalError, match=r"coco_pope_random.json: line 1: not readable as JSON"):
        pope.load(root)
