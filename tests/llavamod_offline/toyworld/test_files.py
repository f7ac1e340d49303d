"""The toy world's files are read by the same modules that read everybody's files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eval.tasks import get_task
from llavamod_offline.data.encode.template import TEMPLATES
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.toyworld.benchmarks import write_benchmarks
from llavamod_offline.toyworld.datasets import write_datasets
from llavamod_offline.toyworld.scene import random_scene
from tests.toy_teacher.mixtures import mixed
from tests.toy_teacher.tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    return write_datasets(folder, align=6, general=30, multitask=12, preference=7, error_share=0.3, seed=5)


@pytest.mark.parametrize(("name", "size"), [("align", 6), ("general", 30), ("multitask", 12), ("preference", 7)])
def test_every_set_packs_without_a_rejection(files: dict[str, Path], tmp_path: Path, name: str, size: int) -> None:
    images = [files[name].parent / "images"] if name != "preference" else []
    summary = write_set(prepare_sources([files[name]], images=images, keys="id"), tmp_path / name)
    assert (summary.samples, summary.rejected) == (size, 0)
    packed = SampleSet.open(tmp_path / name)
    sample = packed.read(0)
    assert len(sample.images) == 1
    assert sample.is_preference == (name == "preference")


def test_rlaif_columns_are_those_of_the_published_set(files: dict[str, Path]) -> None:
    assert set(pq.read_schema(files["preference"]).names) == {
        "ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path",
    }  # fmt: skip


def test_errors_are_as_many_as_asked(tmp_path: Path) -> None:
    """With and without errors, the same seed gives the same questions in the first row; some answers differ."""
    sizes = {"align": 0, "general": 60, "multitask": 0, "preference": 0, "seed": 3}
    right = json.loads(write_datasets(tmp_path / "a", error_share=0.0, **sizes)["general"].read_text())
    again = json.loads(write_datasets(tmp_path / "b", error_share=0.0, **sizes)["general"].read_text())
    wrong = json.loads(write_datasets(tmp_path / "c", error_share=1.0, **sizes)["general"].read_text())
    assert right == again
    assert right[0]["conversations"][0] == wrong[0]["conversations"][0]
    assert right[0]["conversations"][1] != wrong[0]["conversations"][1]


@pytest.mark.parametrize("task", ["pope", "gqa", "mme", "object_halbench"])
def test_benchmarks_load_and_a_right_answer_is_scored_right(tmp_path: Path, task: str) -> None:
    write_benchmarks(tmp_path, images=4, seed=1)
    module = get_task(task)
    examples = module.load(tmp_path)
    assert len(examples) >= 4
    if task == "gqa":
        assert module.score is not None
        truth = json.loads((tmp_path / "gqa" / "testdev_balanced_questions.json").read_text())
        scored = module.score(examples, {example.id: truth[example.id]["answer"] for example in examples})
        assert scored.metrics["accuracy"] == 1.0


def test_the_tokenizer_gives_every_text_back_and_has_qwens_special_tokens() -> None:
    tokenizer = train_tokenizer(600, scenes=200)
    for token in SPECIAL_TOKENS:
        assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token)) == token
    rng = random.Random(0)
    texts = [turn.text.replace(IMAGE_PLACEHOLDER, "") for _ in range(20) for turn in mixed(random_scene(rng), rng)]
    for text in [*texts, "naïve café 123 \U0001f600", *(s.text for s in TEMPLATES["qwen"].render(()))]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
