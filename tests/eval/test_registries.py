"""What every task and every answer engine must provide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.engines import ENGINES, open_engine
from eval.report.comparison import SOURCES
from eval.tasks import TASKS
from llavamod_offline.errors import LlavaModError
from tests.eval.fixtures import MMBENCH_ROWS, mmhal_root, science_root, write_tsv


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_headlines_of_its_own_and_is_scored(name: str) -> None:
    task = TASKS[name]
    assert task.headlines
    for headline in task.headlines:
        assert headline.task == name
        assert set(headline.published) <= set(SOURCES)
    assert task.score or task.judging
    assert task.upload is None or task.upload.suffix != ".jsonl"  # that suffix is for LLaVA's answers


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_names_a_folder_that_it_cannot_load(name: str, tmp_path: Path) -> None:
    with pytest.raises(LlavaModError):
        open_engine(name, tmp_path / "none", template="qwen", image_aspect="pad", dtype="auto", device="cpu")


def test_a_report_words_the_right_answer(tmp_path: Path) -> None:
    science_root(tmp_path)
    mmhal_root(tmp_path, 1)
    write_tsv(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", MMBENCH_ROWS[:2])
    worded = {name: [TASKS[name].reference(example) for example in TASKS[name].load(tmp_path)] for name in _WORDED}
    assert worded == _WORDED
    for name in ("textvqa", "vizwiz"):
        human = SimpleNamespace(reference=SimpleNamespace(answers=("red", "dark red", "red")))
        assert TASKS[name].reference(human) == "red (2), dark red (1)"  # type: ignore[arg-type]


_WORDED = {
    "scienceqa": ["B", "A", "C"],
    "mmhal": ["Answer 0."],
    "mmbench": ["A. a red cat", "B. a red cat"],
}
