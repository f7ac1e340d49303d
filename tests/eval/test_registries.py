"""What every task and every answer engine must have."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.engines import ENGINES, open_engine
from eval.report.comparison import SOURCES
from eval.tasks import TASKS
from llavamod_offline.errors import LlavaModError


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_headlines_of_its_own_and_is_scored(name: str) -> None:
    task = TASKS[name]
    assert task.headlines
    for headline in task.headlines:
        assert headline.task == name
        assert set(headline.published) <= set(SOURCES)
    assert task.score or task.judging
    assert task.upload is None or task.upload.suffix != ".jsonl"  # LLaVA's answers


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_names_a_folder_that_it_cannot_load(name: str, tmp_path: Path) -> None:
    with pytest.raises(LlavaModError):
        open_engine(name, tmp_path / "none", template="qwen", image_aspect="pad", dtype="auto", device="cpu")
