"""The card of an exported student: what is in it, and what must not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    assert ("eval-student portable" in card) == (aspect == "pad")
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings["stage"] == stage
    assert str(world.root) not in card
    assert str(tmp_path) not in card
