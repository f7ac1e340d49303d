"""Which template a student is trained with: its own, the cache's, or LLaVA-MoD's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.models.checkpoint import load_tokenizer
from tests.llavamod_offline.data.encode.test_chat_template import PARTS_ALONE, THINKING
from tests.tiny import write_tiny_language_model, write_tiny_llava, write_tiny_tower
from tests.train.conftest import World, write_cache
from train.config import TrainConfig
from train.run import train


def wording(student: str) -> str:
    return choose_template("auto", lambda: load_tokenizer(Path(student))).name


def parts(tmp_path: Path) -> tuple[str, ...]:
    tower, text = write_tiny_tower(tmp_path / "tower"), write_tiny_language_model(tmp_path / "text")
    return "student.checkpoint=null", f"student.vision_tower={tower}", f"student.language_model={text}"


@pytest.mark.parametrize("name", ["qwen", "chatml"])
def test_a_checkpoint_keeps_its_wording(world: World, tmp_path: Path, name: str) -> None:
    student = write_tiny_llava(tmp_path / "student", template=name)
    summary = train(world.config("sft", tmp_path / "run", "steps=1", f"student.checkpoint={student}"))
    assert wording(summary.student) == name
    assert load_config(TrainConfig, [tmp_path / "run" / "config.yaml"]).template == name
    assert f"| conversation template | {name};" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_a_new_student_takes_the_caches_wording_or_else_llava_mods(world: World, tmp_path: Path) -> None:
    chatml = write_cache(tmp_path / "cache", world.chats, world.teacher, "template=chatml")
    new = parts(tmp_path)
    for name, stage, given in (
        ("qwen", "sft", ()),
        ("qwen", "mimic_dense", ()),
        ("chatml", "mimic_dense", (f"cache.path={chatml}",)),
    ):
        output = tmp_path / f"{name}-{stage}"
        assert wording(train(world.config(stage, output, "steps=1", *new, *given)).student) == name


def test_a_wording_that_the_new_students_tokenizer_lacks_is_one_line(world: World, tmp_path: Path) -> None:
    teacher = write_tiny_llava(tmp_path / "teacher", template=None)
    (teacher / "chat_template.jinja").write_text(PARTS_ALONE)
    cache = write_cache(tmp_path / "cache", world.chats, teacher)
    with pytest.raises(ConfigError, match=r"captured with template tokenizer \(sha256 .*set template to qwen, chatml"):
        train(world.config("mimic_dense", tmp_path / "run", *parts(tmp_path), f"cache.path={cache}"))


def test_student_and_cache_of_different_wordings_are_both_named(world: World, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, world.teacher, "template=chatml")
    config = world.config("mimic_dense", tmp_path / "run", "steps=1", f"cache.path={cache}")
    with pytest.raises(
        CacheError, match=r"'chatml' .*student's 'qwen' .*set template=chatml .*template=qwen"
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert wording(train(replace(config, template="chatml")).student) == "chatml"


def test_a_checkpoint_that_cannot_be_followed_is_one_line(world: World, tmp_path: Path) -> None:
    student = write_tiny_llava(tmp_path / "student", template=None)
    (student / "chat_template.jinja").write_text(THINKING)
    with pytest.raises(ConfigError, match=r"template 'auto': .*student.*set template to qwen, chatml"):
        train(world.config("sft", tmp_path / "run", f"student.checkpoint={student}"))


def test_a_run_with_another_wording_is_the_same_run_without_saying_so(world: World, tmp_path: Path) -> None:
    """Also runs from before the template was chosen automatically: they store its name."""
    first = train(world.config("sft", tmp_path / "run", "steps=1", "template=chatml"))
    assert train(world.config("sft", tmp_path / "run", "steps=1")) == first
    with pytest.raises(ConfigError, match=r"template: the finished run .* with chatml, not qwen"):
        train(world.config("sft", tmp_path / "run", "steps=1", "template=qwen"))
