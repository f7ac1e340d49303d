"""A finished run is reported only to the command that made it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llavamod_offline.errors import ConfigError
from tests.tiny import write_tiny_llava, write_tiny_set
from tests.train.conftest import World, write_cache
from train.run import train


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train(world.config("mimic_dense", output, "steps=2"))
    return output


def refused(world: World, output: Path, *settings: str) -> str:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ConfigError) as caught:
        train(world.config("mimic_dense", output, "steps=2", *settings))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_data_cache_start_or_settings_are_refused(world: World, finished: Path, tmp_path: Path) -> None:
    other_set = write_tiny_set(tmp_path / "set", 16)
    other_cache = write_cache(tmp_path / "cache", world.chats, world.teacher, "capture.preset=compact")
    other_student = write_tiny_llava(tmp_path / "student", seed=3)
    assert refused(world, finished, f"data.set={other_set}").startswith("data.set: the finished run in ")
    assert refused(world, finished, f"cache.path={other_cache}").startswith("cache.path: ")
    assert refused(world, finished, f"student.checkpoint={other_student}").startswith("student: ")
    for remedy in ("optim.lr=2e-3", "optim.grad_clip=2", "max_length=1024", "data.too_long=drop"):
        assert refused(world, finished, remedy).startswith(f"{remedy.partition('=')[0]}: ")
    everything = refused(
        world, finished, f"data.set={other_set}", f"cache.path={other_cache}", "optim.lr=2e-3", "seed=4"
    )
    for key in ("data.set", "cache.path", "optim.lr", "seed"):
        assert f"{key}: " in everything
    assert everything.endswith(": set them back, or choose another output")


@pytest.mark.parametrize("key", ["data.set", "cache.path", "student.checkpoint"])
def test_what_does_not_exist_is_not_reported_as_finished(world: World, finished: Path, key: str) -> None:
    assert "/nowhere" in refused(world, finished, f"{key}=/nowhere")


def test_equal_contents_at_other_places_are_the_same_run(world: World, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "renamed"
    shutil.copytree(finished, output)
    moved = (
        f"data.set={shutil.copytree(world.chats, tmp_path / 'set')}",
        f"cache.path={shutil.copytree(world.chats_cache, tmp_path / 'cache')}",
        f"student.checkpoint={shutil.copytree(world.student, tmp_path / 'student')}",
    )
    first = train(world.config("mimic_dense", finished, "steps=2"))
    again = train(world.config("mimic_dense", output, "steps=2", *moved))
    assert again == replace(first, output=str(output), student=str(output / "student"))
    assert Path(again.student).is_dir()


@pytest.mark.parametrize(("name", "what"), [("set.json", "a packed set"), ("cache.json", "a cache")])
def test_a_run_is_not_written_into_something_else(world: World, tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"output: .* is {what} .*choose another folder"):
        train(world.config("sft", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
