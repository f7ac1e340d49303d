"""The model card of an exported student: what it contains, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.engines.hf import HfEngine
from eval.example import Example
from eval.files import FileImage
from tests.plain import engine_answers, plain_answers, questions
from tests.tiny import tiny_image
from tests.train.conftest import World
from tests.train.reference import read_metrics
from train.run import train


@pytest.mark.parametrize("stage", ["sft", "mimic_sparse", "preference"])
def test_the_card_says_what_made_the_student(world: World, tmp_path: Path, stage: str) -> None:
    aspect = "square" if stage == "sft" else "pad"
    summary = train(world.config(stage, tmp_path / "run", "steps=2", f"image_aspect={aspect}"))
    card = (Path(summary.student) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| stage | {stage}, 2 steps over 24 samples |" in card
    assert f"| loss | {read_metrics(tmp_path / 'run')[-1]['loss']:.5g} |" in card
    assert (f"`{summary.cache_digest}`" in card) == (stage != "sft")
    assert ("4 experts, 2 per token" in card) == (stage == "mimic_sparse")
    assert ("pads images to squares" in card) == (aspect == "pad")
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings["stage"] == stage
    assert str(world.root) not in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("stage", ["align", "sft", "mimic_dense", "mimic_sparse", "preference"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_cards_code_gives_the_answers_of_generate(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    student = Path(train(world.config(stage, tmp_path / "run", "steps=2")).student)
    (tmp_path / "wide.png").write_bytes(tiny_image(5, (70, 20)))
    code = (student / "README.md").read_text().split("```python\n")[1].split("```")[0]
    asked = Example("1", "What is it?", None, "wide.png", FileImage(tmp_path, ("wide.png",)))
    answer = HfEngine(student).answer([asked], 128)[0]
    for name, value in (("FOLDER", student), ("IMAGE", tmp_path / "wide.png"), ("QUESTION", asked.prompt)):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(value)))
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out == f"{answer.text}\n"
    others = questions(tmp_path)
    assert plain_answers(student, others, 8) == engine_answers(student, others, 8)
