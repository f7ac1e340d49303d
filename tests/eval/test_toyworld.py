"""The toy world's benchmarks, and small ones in the other formats, through the same code that runs the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.example import Example
from eval.generate import EvalGenerateConfig, generate
from eval.score import score_task
from eval.tasks import get_task, object_halbench
from llavamod_offline.toyworld.benchmarks import write_benchmarks
from tests.eval.fixtures import MMBENCH_ROWS, mmhal_root, science_root, scored, write_tsv
from tests.tiny import write_tiny_llava

TASKS = ["pope", "gqa", "mme", "object_halbench", "scienceqa", "mmbench", "mmbench_cn", "mmhal"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_benchmarks(folder, images=2, seed=3)
    for language in ("mmbench/mmbench_dev_en_20231003", "mmbench_cn/mmbench_dev_cn_20231003"):
        write_tsv(folder / f"{language}.tsv", MMBENCH_ROWS)
    return mmhal_root(science_root(folder), 2)


def test_every_format_is_answered_and_scored(root: Path, tmp_path: Path) -> None:
    model = write_tiny_llava(tmp_path / "model")
    settings = EvalGenerateConfig(
        model=str(model), root=str(root), output=str(tmp_path / "out"), tasks=TASKS, batch_size=7, max_new_tokens=3
    )
    for task, path in generate(settings).items():
        if task != "mmhal":
            score = score_task(task, root, path)
            assert score.n == len(get_task(task).load(root)) > 0
            assert score.n_missing == 0
            assert score.metrics
        assert path.with_name("answers.jsonl").is_file()
    assert (tmp_path / "out" / "mmbench" / "upload.xlsx").is_file()
    assert (tmp_path / "out" / "gqa" / "upload.json").is_file()


def test_the_truth_scores_best(root: Path) -> None:
    def truth(example: Example[Any]) -> str:
        reference = example.reference
        return reference.answer if hasattr(reference, "answer") else "Yes" if reference.yes else "No"

    for task, metric, best in (("pope", "f1_mean", 1.0), ("gqa", "accuracy", 1.0), ("mme", "existence", 200.0)):
        module = get_task(task)
        texts = {example.id: truth(example) for example in module.load(root)}
        assert scored(module, root, texts).metrics[metric] == best


def test_descriptions_name_what_is_there_or_not(root: Path) -> None:
    examples = object_halbench.load(root)
    assert all(example.reference.objects for example in examples)
    right: dict[str, str | None] = {e.id: f"I see {', a '.join(sorted(e.reference.objects))}." for e in examples}
    result = object_halbench.score(examples, right)
    assert (result.metrics["object_hall"], result.metrics["object_recall"]) == (0.0, 1.0)
    absent = sorted(set(examples[0].reference.vocabulary.synonyms) - examples[0].reference.objects)[0]
    result = object_halbench.score(examples, {**right, examples[0].id: f"There are two {absent}s."})
    assert result.metrics["response_hall"] == pytest.approx(1 / len(examples))
