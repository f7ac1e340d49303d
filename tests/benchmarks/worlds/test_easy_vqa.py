"""easy-VQA with some answers replaced."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.worlds.easy_vqa import write_training_set


def _turns(file: Path) -> list[tuple[str, str]]:
    rows = json.loads(file.read_text())
    return [(turn["from"], turn["value"]) for row in rows for turn in row["conversations"]]


def test_wrong_answers_are_of_the_same_kind_to_the_same_questions(tmp_path: Path) -> None:
    right = _turns(write_training_set(tmp_path / "right.json", images=200, seed=1))
    noisy = _turns(write_training_set(tmp_path / "noisy.json", images=200, seed=1, wrong=0.2))
    pairs = list(zip(right, noisy, strict=True))
    assert all(one == other for one, other in pairs if one[0] == "human")
    answers = [(one[1], other[1]) for one, other in pairs if one[0] == "gpt"]
    wrong = [(one, other) for one, other in answers if one != other]
    assert 0.15 < len(wrong) / len(answers) < 0.25
    assert all((one in ("yes", "no")) == (other in ("yes", "no")) for one, other in wrong)
