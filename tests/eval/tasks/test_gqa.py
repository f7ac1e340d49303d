"""GQA. Sources: scripts/convert_gqa_for_eval.py; GQA's eval.py; LLaVA-MoD's eval_gqa_1.py for what not to do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from eval.score import score_task
from eval.tasks import gqa
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import answers, gqa_root, scored, write_jsonl


def reference(answer: str, structural: str = "query", semantic: str = "attr", group: str = "color") -> dict[str, Any]:
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"answer": answer, "isBalanced": True, "types": types, "groups": {"global": group, "local": None}}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("red", True),
        ("Red", True),
        ("RED...", True),  # every trailing period
        ("red. ", False),  # no space is stripped
        (" red", False),
        ("the red", False),  # no article is dropped
        ("red!", False),
        ("reddish", False),
        ("", False),
    ],
)
def test_an_answer_equals_the_reference_letter_for_letter(tmp_path: Path, text: str, right: bool) -> None:
    assert scored(gqa, gqa_root(tmp_path, {"1": reference("red")}), {"1": text}).metrics["accuracy"] == float(right)


def test_splits_and_types(tmp_path: Path) -> None:
    root = gqa_root(
        tmp_path,
        {
            "1": reference("red"),
            "2": reference("blue", semantic="obj"),
            "3": reference("yes", "verify", "rel"),
            "4": reference("no", "logical", "rel"),
            "5": {**reference("no", "logical", "rel"), "isBalanced": False},
        },
    )
    result = scored(gqa, root, {"1": "red", "2": "red", "3": "yes", "4": "no", "5": "yes"})
    assert result.metrics["accuracy"] == 0.75
    assert result.metrics["accuracy_open"] == 0.5
    assert result.metrics["accuracy_binary"] == 1.0
    assert result.metrics["accuracy_structural_verify"] == 1.0
    assert result.metrics["accuracy_semantic_rel"] == 1.0
    assert result.metrics["accuracy_semantic_obj"] == 0.0
    assert "1 unbalanced questions left out" in result.notes


def test_distribution_is_the_chi_square_over_groups(tmp_path: Path) -> None:
    """color: red 2, blue 1 against red 3 → (3-2)²/2 + (0-1)²/1 = 1.5; size: big 1 against big 1 → 0."""
    root = gqa_root(
        tmp_path,
        {"1": reference("red"), "2": reference("red"), "3": reference("blue"), "4": reference("big", group="size")},
    )
    result = scored(gqa, root, {"1": "red", "2": "red", "3": "red", "4": "big"})
    assert result.metrics["distribution"] == pytest.approx((1.5 * 3 + 0 * 1) / 4 / 100)


def test_questions_without_a_group_are_left_out_of_the_distribution(tmp_path: Path) -> None:
    """As in GQA's eval.py: most yes/no questions have `"global": null`."""
    plain = {**reference("yes", "verify"), "groups": {"global": None, "local": "13-pond_cart"}}
    root = gqa_root(tmp_path, {"1": reference("red"), "2": reference("blue"), "3": plain})
    result = scored(gqa, root, {"1": "red", "2": "red", "3": "no"})
    assert result.metrics["distribution"] == pytest.approx(((2 - 1) ** 2 / 1 + (0 - 1) ** 2 / 1) / 100)
    assert "distribution" not in scored(gqa, gqa_root(tmp_path / "b", {"3": plain}), {"3": "no"}).metrics


def test_metrics_equal_the_official_sums(tmp_path: Path) -> None:
    """GQA's eval.py written out: lists of scores, histograms of answers by group, chi-square by group."""
    rng, words = random.Random(0), ("red", "blue", "yes", "no", "left")
    references = {
        str(number): reference(
            rng.choice(words), rng.choice(("query", "verify")), rng.choice(("attr", "rel")), rng.choice(("c", "d", ""))
        )
        | {"isBalanced": rng.random() < 0.9}
        for number in range(300)
    }
    texts = {name: rng.choice(words).upper() + rng.choice(("", ".", "..")) for name in references}
    hits: dict[str, list[float]] = {}
    gold: dict[str, list[str]] = {}
    said: dict[str, list[str]] = {}
    for name, question in references.items():
        if not question["isBalanced"]:
            continue
        answer = texts[name].replace(".", "").lower()
        kind, group = question["types"]["structural"], question["groups"]["global"]
        for key in ("accuracy", "accuracy_open" if kind == "query" else "accuracy_binary"):
            hits.setdefault(key, []).append(float(answer == question["answer"]))
        if group:
            gold.setdefault(group, []).append(question["answer"])
            said.setdefault(group, []).append(answer)
    weighted = 0.0
    for group, right in gold.items():
        chi = sum((said[group].count(word) - right.count(word)) ** 2 / right.count(word) for word in set(right))
        weighted += chi * len(right)
    metrics = scored(gqa, gqa_root(tmp_path, references), texts).metrics
    for key, values in hits.items():
        assert metrics[key] == pytest.approx(sum(values) / len(values))
    assert metrics["distribution"] == pytest.approx(weighted / sum(map(len, gold.values())) / 100)


def test_a_missing_answer_does_not_shrink_the_denominator(tmp_path: Path) -> None:
    root = gqa_root(tmp_path / "data", {"1": reference("red"), "2": reference("blue")})
    path = write_jsonl(tmp_path / "a.jsonl", answers({"1": "red"}))
    with pytest.raises(EvalError, match=r"1 question \('2'\) without a prediction"):
        score_task("gqa", root, path)
    assert score_task("gqa", root, path, allow_missing=True).metrics["accuracy"] == 0.5


def test_both_places_of_the_references(tmp_path: Path) -> None:
    for below in ("gqa", "gqa/data"):
        root = gqa_root(tmp_path / below.replace("/", "-"), {"1": reference("red")}, below=below)
        assert len(gqa.load(root)) == 1
        assert [path.name for path in gqa.reference_files(root)][1] == "testdev_balanced_questions.json"


@pytest.mark.parametrize("name", ["types", "groups"])
def test_odd_types_and_groups_are_named(tmp_path: Path, name: str) -> None:
    root = gqa_root(tmp_path, {"1": reference("red"), "2": reference("red") | {name: "query"}})
    message = f"testdev_balanced_questions.json: question '2', {name}: expected a JSON object, found str"
    with pytest.raises(EvalError, match=message):
        gqa.load(root)
    assert gqa.load(gqa_root(tmp_path, {"1": reference("red") | {name: None}}))[0].reference.answer == "red"


def test_a_question_without_a_reference_is_named(tmp_path: Path) -> None:
    root = gqa_root(tmp_path, {"1": reference("red")})
    write_jsonl(
        root / "gqa" / "llava_gqa_testdev_balanced.jsonl", [{"question_id": "9", "image": "n1.jpg", "text": "Q?"}]
    )
    with pytest.raises(EvalError, match=r"line 1: question '9' is not in testdev_balanced_questions.json"):
        gqa.load(root)
