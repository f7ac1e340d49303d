"""The demo's page: the table, the curves, and images with every model's answers, all escaped as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llavamod_offline.demo.plan import models
from llavamod_offline.demo.report import write_report
from llavamod_offline.demo.results import COLUMNS
from tests.llavamod_offline.pages.test_page import HOSTILE, Parsed
from tests.tiny import tiny_image


def test_the_page_has_the_table_curves_and_the_answers_that_differ(tmp_path: Path) -> None:
    for run in ("mimic_dense", "smaller", "mimic_sparse", "align", "sft", "preference"):
        (tmp_path / "train" / run).mkdir(parents=True)
        line = {"step": 1, "kl": 0.5, "loss": 1.0, "reward_margin": 0.1}
        (tmp_path / "train" / run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    root = tmp_path / "benchmarks" / "gqa"
    (root / "data" / "images").mkdir(parents=True)
    questions = {str(n): {"imageId": f"i{n}", "question": f"{n}? {HOSTILE}", "answer": "red"} for n in range(2)}
    (root / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    (root / "data" / "images" / "i1.jpg").write_bytes(tiny_image(0, (24, 16)))
    for model in models(tmp_path):
        folder = tmp_path / "eval" / model.slug / "gqa"
        folder.mkdir(parents=True)
        answers = {"0": "red", "1": "Red." if model.slug == "teacher" else HOSTILE}
        lines = [json.dumps({"id": identifier, "text": text}) for identifier, text in answers.items()]
        (folder / "predictions.jsonl").write_text("\n".join(lines))
    row = {name: HOSTILE if name in ("name", "shape") else 0.5 for name in COLUMNS}
    summary: dict[str, Any] = {"rows": [row], "cache": {"positions": 1234, "bytes_per_position": 56.78}}
    summary["routing"] = {"own": 0.39281, "random": 0.39312}
    (tmp_path / "commands.sh").write_text(f"pack a\ncache-teacher run '{HOSTILE}'\n")
    page = Parsed(write_report(tmp_path, summary).read_text())
    assert (page.loads, page.handlers, [tag for tag, _ in page.tags].count("img")) == ([], [], 1)
    charts = [json.loads(attrs["data-chart"] or "") for _, attrs in page.tags if "data-chart" in attrs]
    drawn = [[(line["name"], line["colour"]) for line in chart["series"]] for chart in charts]
    assert drawn == [  # with the names of the table's rows, and colours by their places
        [("distilled student", 2), ("smaller student, same cache", 3)],
        [("upcycled sparse student", 4)],
        [("student without teacher", 1)],
        [("aligned projector", 6)],
        [("after preference distillation", 5)],
    ]
    assert page.text.count(HOSTILE) == 2 + 1 + 5 + 1  # the row, the question, the students' answers, a command
    assert "cache-teacher run" in page.text
    assert [attrs["class"] for tag, attrs in page.tags if tag == "td" and "class" in attrs] == ["right", *["wrong"] * 5]
    assert "1,234 supervised positions" in page.text
    assert "0.3928 with its own routing, 0.3931 with random routing" in page.text
