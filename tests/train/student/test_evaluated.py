"""Trained students of families other than LLaVA in `eval-student`, using only the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from eval.cli import app
from llavamod_offline.entrypoint import run_command
from tests.eval.fixtures import pope_root
from tests.plain import plain_answers
from tests.train.conftest import World
from tests.train.student.family_world import WRITERS, plain_processor
from train.run import train

# The processors of GLM-V and InternVL use a deprecated way of turning tensors into arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
FAMILIES = ("smolvlm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_vl", "internvl", "gemma3")))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(app, [str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_is_asked_scored_and_answers_as_in_plain_transformers(
    world: World, tmp_path: Path, name: str
) -> None:
    start = WRITERS[name](tmp_path / "start")
    settings = (f"student.checkpoint={start}", "trainable=[projector,text]", "steps=2", "batch.micro_size=2")
    student = Path(train(world.config("sft", tmp_path / "run", *settings)).student)
    root = pope_root(tmp_path / "data", labels=("yes", "no"))
    asked = (f"model={student}", f"root={root}", f"output={tmp_path / 'out'}", "tasks=[pope]")
    assert run("generate", *asked, "max_new_tokens=5", "batch_size=4") == 0
    predictions = tmp_path / "out" / "pope" / "predictions.jsonl"
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 6
    images = root / "pope" / "val2014"
    questions = [(row["prompt"], [images / row["image"]]) for row in rows]
    expected = plain_answers(student, questions, 5, processor=plain_processor(student), batch=False)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert [row["text"] for row in rows] == [
        tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected
    ]
    assert [row["n_tokens"] for row in rows] == [len(ids) for ids in expected]
    output = tmp_path / "score.json"
    assert run("score", "pope", "--root", root, "--predictions", predictions, "--output", output) == 0
    assert json.loads(output.read_text())["n"] == 6
