"""VizWiz. Sources: scripts/convert_vizwiz_for_submission.py; VizWiz's val.json; LLaVA #1733 (form), #1916 (closed)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.export.answers import export
from eval.score import score_task
from eval.tasks import vizwiz
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import answers, scored, write_json, write_jsonl

PROMPT = "{}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + (
    "Answer the question using a single word or phrase."
)


def vizwiz_root(root: Path, *, below: str = "vizwiz/Annotations") -> Path:
    """One question that its image answers and one that it does not."""

    def gold(*texts: str) -> list[dict[str, str]]:
        return [{"answer": text, "answer_confidence": "yes"} for text in texts]

    rows = [
        {"image": "v1.jpg", "question": "What is this?", "answers": gold(*["basil"] * 2, *["herb"] * 8)},
        {"image": "v2.jpg", "question": "Which?", "answers": gold(*["unanswerable"] * 10), "answerable": 0},
    ]
    write_json(root / below / "val.json", rows)
    return root


def test_the_validation_split_is_scored(tmp_path: Path) -> None:
    for below in ("vizwiz/Annotations", "vizwiz"):
        root = vizwiz_root(tmp_path / below.replace("/", "-"), below=below)
        assert [e.prompt for e in vizwiz.load(root)] == [PROMPT.format("What is this?"), PROMPT.format("Which?")]
        result = scored(vizwiz, root, {"v1.jpg": "Basil.", "v2.jpg": "Unanswerable"})
        assert result.metrics["accuracy"] == pytest.approx((0.6 + 1) / 2)
        assert result.metrics["accuracy_answerable"] == pytest.approx(0.6)
        assert result.metrics["accuracy_unanswerable"] == 1.0
    assert "VizWiz-val" in vizwiz.TASK.protocol


def test_a_question_file_decides_which_questions_and_their_ids(tmp_path: Path) -> None:
    root = vizwiz_root(tmp_path / "data")
    write_jsonl(root / "vizwiz" / "llava_val.jsonl", [{"question_id": 7, "image": "v2.jpg", "text": "Which?"}])
    path = write_jsonl(tmp_path / "a.jsonl", answers({7: "unanswerable"}))
    assert score_task("vizwiz", root, path).metrics["accuracy"] == 1.0
    write_jsonl(root / "vizwiz" / "llava_val.jsonl", [{"question_id": 7, "image": "v9.jpg", "text": "Which?"}])
    with pytest.raises(EvalError, match=r"line 1: image 'v9.jpg' is not in val.json"):
        vizwiz.load(root)


def test_the_test_split_is_exported_but_not_scored(tmp_path: Path) -> None:
    root = tmp_path / "data"
    rows = [{"question_id": 1, "image": "t1.jpg", "text": "Q"}, {"question_id": 2, "image": "t2.jpg", "text": "Q"}]
    write_jsonl(root / "vizwiz" / "llava_test.jsonl", rows)
    path = write_jsonl(tmp_path / "a.jsonl", answers({2: "It's Two dogs.", 1: "A"}))
    with pytest.raises(EvalError, match="test split's answers are hidden"):
        score_task("vizwiz", root, path)
    export("vizwiz", root, path, tmp_path / "upload.json")
    assert json.loads((tmp_path / "upload.json").read_text()) == [
        {"image": "t1.jpg", "answer": ""},
        {"image": "t2.jpg", "answer": "it 's 2 dogs"},
    ]
