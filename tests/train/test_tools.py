"""Conversations with tools through capture and training: answers are learnt if the template has a wording for tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.read.reader import open_cache
from tests.llavamod_offline.data.encode.test_tool_wording import QWEN25, TALK
from tests.tiny import tiny_samples, write_tiny_llava
from tests.train.conftest import World, write_cache
from train.run import train


def _checkpoint(folder: Path, *, hidden: int = 64) -> Path:
    write_tiny_llava(folder, template=None, hidden=hidden)
    (folder / "chat_template.jinja").write_text(QWEN25)
    return folder


def _set(folder: Path) -> Path:
    plain = tiny_samples(7)
    shown = next(sample for sample in plain if len(sample.images) == 1)
    turns = tuple(Turn(turn.role, turn.text.replace(" or\n<image>", "")) for turn in TALK)
    write_set([*plain, Sample("tools", turns, shown.images, shown.image_extensions)], folder)
    return folder


def test_the_answers_are_captured_and_learnt(world: World, tmp_path: Path) -> None:
    data, teacher = _set(tmp_path / "set"), _checkpoint(tmp_path / "teacher", hidden=48)
    cache = open_cache(write_cache(tmp_path / "cache", data, teacher))
    assert cache.sequence("tools", "response").sum_log_prob < 0
    student = _checkpoint(tmp_path / "student")
    given = (f"data.set={data}", f"cache.path={tmp_path / 'cache'}", f"student.checkpoint={student}", "steps=1")
    summary = train(world.config("mimic_dense", tmp_path / "run", *given))
    assert summary.samples == len(cache) == 8
    words = choose_template("auto", lambda: load_tokenizer(Path(summary.student)))
    expected = choose_template("auto", lambda: load_tokenizer(student))
    assert "".join(part.text for part in words.render(TALK)) == "".join(part.text for part in expected.render(TALK))


def test_without_words_for_tools_the_sample_is_rejected_by_name(world: World, tmp_path: Path) -> None:
    data = _set(tmp_path / "set")
    write_cache(tmp_path / "cache", data, world.teacher)
    [line] = (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "tools"
    assert "template 'qwen' has no wording for tools" in json.loads(line)["reason"]
    for length in ("max_length=64", "max_length=2048"):  # found when lengths are measured, and in a batch
        with pytest.raises(DataError, match=r"^sample 'tools' \(response\): template 'qwen' has no wording for tools"):
            train(world.config("sft", tmp_path / length, f"data.set={data}", length, "data.too_long=drop"))


def test_the_words_around_tools_count_towards_max_length(tmp_path: Path) -> None:
    student = _checkpoint(tmp_path / "student")
    family = choose_template("auto", lambda: load_tokenizer(student))
    assert family.tool_wording is not None
    once, around_turn = family.tool_wording.bytes_around(family)
    said = sum(len(turn.text.encode()) for turn in TALK)
    plain = sum(len(segment.text.encode()) for segment in family.render((TALK[2], TALK[6])))
    whole = sum(len(segment.text.encode()) for segment in family.render(TALK))
    assert whole <= said + once + len(TALK) * (around_turn + plain)
