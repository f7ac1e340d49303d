"""TextVQA. Sources: llava/eval/eval_textvqa.py (join, prompts), m4c_evaluator.py (test_vqa.py), LLaVA #976 (OCR)."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.score import score_task
from eval.tasks import textvqa
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import SHORT, answers, scored, write_json, write_jsonl

OCR = "\nReference OCR token: STOP, 42"


def textvqa_root(root: Path, *, ocr: bool = True) -> Path:
    """Two questions about one image, one about another."""
    rows = [("aa", "What word is it?"), ("aa", "Which Number?"), ("bb", "What word is it?")]
    write_jsonl(
        root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl",
        [
            {"question_id": i, "image": f"{i}.jpg", "text": q + (OCR if ocr else "") + SHORT, "category": "default"}
            for i, q in rows
        ],
    )
    golds = [["stop"] * 10, ["42"] * 2 + ["7"] * 8, ["Exit"] * 3 + ["the exit"] * 7]
    data = [
        {"image_id": i, "question": q, "question_id": n, "answers": gold}
        for n, ((i, q), gold) in enumerate(zip(rows, golds, strict=True))
    ]
    write_json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": data})
    return root


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (f"Which Number?{OCR}{SHORT}", "which number?"),
        (f"Reference OCR token: A, B\nWhich Number?{SHORT}", "which number?"),
        (f"Which Number?{SHORT}", "which number?"),
        ("OCR tokens: A, B. Question: Which Number? Short answer:", "which number?"),
    ],
)
def test_the_question_is_found_in_every_published_form_of_the_prompt(prompt: str, question: str) -> None:
    assert textvqa.question_key(prompt) == question


def test_accuracy(tmp_path: Path) -> None:
    result = scored(textvqa, textvqa_root(tmp_path), {"aa#1": "STOP.", "aa#2": "42", "bb#1": "an exit"})
    assert result.metrics["accuracy"] == pytest.approx((1 + 0.6 + 1) / 3)
    assert result.notes == ("OCR tokens in 3 of 3 published prompts",)
    assert scored(textvqa, textvqa_root(tmp_path), {"aa#1": "A", "aa#2": None, "bb#1": "x"}).n_unparsed == 1


def test_samples_of_lmms_eval_are_joined_by_the_questions_own_id(tmp_path: Path) -> None:
    """Its docs hold `question_id`, the question's, beside `image_id`, the one that LLaVA's file has."""
    root = textvqa_root(tmp_path / "data")
    given = [("aa", "What word is it?", "stop"), ("aa", "Which Number?", "42"), ("bb", "What word is it?", "exit")]
    rows = [
        {"doc": {"question_id": n, "image_id": image, "question": question}, "filtered_resps": [text]}
        for n, (image, question, text) in enumerate(given)
    ]
    score = score_task("textvqa", root, write_jsonl(tmp_path / "samples.jsonl", rows))
    assert score.texts == {"aa#1": "stop", "aa#2": "42", "bb#1": "exit"}


def test_llava_answers_are_joined_on_image_and_question(tmp_path: Path) -> None:
    root = textvqa_root(tmp_path / "data")
    rows = answers({"bb": "exit"}, {"bb": f"what WORD is it?{SHORT}"})
    rows += answers({"aa": "42"}, {"aa": f"Which Number?{OCR}{SHORT}"})
    rows += answers({"aa": "stop"}, {"aa": f"What word is it?{OCR}{SHORT}"})
    score = score_task("textvqa", root, write_jsonl(tmp_path / "a.jsonl", rows))
    assert score.metrics["accuracy"] == pytest.approx(2.6 / 3)
    assert "1 prompts are worded unlike the published ones" in score.protocol


def test_questions_that_differ_in_spaces_alone_keep_their_own_answers(tmp_path: Path) -> None:
    """The official join is on the lower-cased question, spaces included; only if that finds none are spaces dropped."""
    root = textvqa_root(tmp_path)
    asked = ("What time?", "What  time?", " WHAT time? ")
    rows = [{"question_id": "cc", "image": "cc.jpg", "text": question + OCR + SHORT} for question in asked]
    write_jsonl(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", rows)
    data = [
        {"image_id": "cc", "question": question, "answers": [answer] * 10}
        for question, answer in (("what time?", "one"), ("What  time?", "two"))
    ]
    write_json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": data})
    assert [example.reference.answers[0] for example in textvqa.load(root)] == ["one", "two", "one"]


def test_prompts_without_ocr_are_told(tmp_path: Path) -> None:
    result = scored(textvqa, textvqa_root(tmp_path, ocr=False), {"aa#1": "", "aa#2": "", "bb#1": ""})
    assert result.notes == ("OCR tokens in 0 of 3 published prompts",)


def test_bad_references_are_named(tmp_path: Path) -> None:
    root = textvqa_root(tmp_path)
    path = root / "textvqa" / "TextVQA_0.5.1_val.json"
    write_json(path, {"data": [{"image_id": "aa", "question": "What?", "answers": "stop"}]})
    with pytest.raises(EvalError, match="data, item 1: field 'answers' must be a list of strings"):
        textvqa.load(root)
    write_json(path, {"data": [{"image_id": "aa", "question": "What?", "answers": []}]})
    with pytest.raises(EvalError, match="data, item 1: no 'answers': those of the test split are hidden"):
        textvqa.load(root)
    write_json(path, {"data": []})
    with pytest.raises(EvalError, match=r"line 1: no human answers to 'what word is it\?' about aa"):
        textvqa.load(root)
    write_json(path, [])
    with pytest.raises(EvalError, match="expected a JSON object"):
        textvqa.load(root)
