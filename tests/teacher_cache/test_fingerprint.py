"""The fingerprint: what it notices, what it passes over, and how it says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llavamod_offline.data.template import get_template
from llavamod_offline.errors import CacheError, ModelError
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.fingerprint import (
    check_student,
    describe_template,
    describe_tokenizer,
    describe_weights,
    differences,
)
from teacher_cache.reader import open_cache
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_tokenizer


def test_a_tokenizer_is_the_same_however_it_was_saved(world: World) -> None:
    assert describe_tokenizer(load_tokenizer(world.teacher)) == describe_tokenizer(tiny_tokenizer())


def _changed(change: str) -> PreTrainedTokenizerFast:
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    if change == "merges":
        merges = content["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]
    elif change == "vocabulary":
        vocabulary = content["model"]["vocab"]
        names = [name for name in vocabulary if len(name) == 1][:2]
        vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    else:
        content["added_tokens"][0]["content"] = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


@pytest.mark.parametrize("change", ["merges", "vocabulary", "added_tokens"])
def test_a_student_with_another_tokenizer_is_refused_side_by_side(finished: Path, change: str) -> None:
    fingerprint = open_cache(finished).fingerprint
    student = _changed(change)
    with pytest.raises(CacheError) as caught:
        check_student(fingerprint, student)
    theirs, mine = fingerprint["tokenizer"][change], describe_tokenizer(student)[change]
    assert f"tokenizer.{change}: cache {theirs[:16]}…, student {mine[:16]}…" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_student(fingerprint, student, allow=["tokenizer"])
    fields = [f"tokenizer.{name}" for name in ("merges", "vocabulary", "added_tokens")]
    check_student(fingerprint, student, allow=fields)
    others = [field for field in fields if field != f"tokenizer.{change}"]
    with pytest.raises(CacheError, match=change):
        check_student(fingerprint, student, allow=others)


def test_the_same_tokenizer_passes(world: World, finished: Path) -> None:
    check_student(open_cache(finished).fingerprint, load_tokenizer(world.teacher))


def test_weights_are_known_by_content_not_by_place(world: World, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(world.teacher, tmp_path / "elsewhere"))
    assert describe_weights(moved) == describe_weights(world.teacher)
    weights = next(moved.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert describe_weights(moved) != describe_weights(world.teacher)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        describe_weights(moved)


def test_templates_differ_by_their_text() -> None:
    qwen, chatml = describe_template(get_template("qwen")), describe_template(get_template("chatml"))
    assert qwen["sha256"] != chatml["sha256"]
    assert qwen == describe_template(get_template("qwen"))


def test_differences_name_fields_and_sections_can_be_allowed() -> None:
    left = {"a": {"x": 1, "y": [1, 2]}, "b": "same", "c": {"only": "here"}}
    right = {"a": {"x": 2, "y": [1, 3]}, "b": "same"}
    assert differences(left, right) == [
        "a.x: there 1, now 2",
        "a.y: there [1, 2], now [1, 3]",
        "c.only: there here, now nothing",
    ]
    assert differences(left, right, allow=["a", "c.only"]) == []
    assert differences(left, right, allow=["a.x", "c"]) == ["a.y: there [1, 2], now [1, 3]"]


def test_what_the_fingerprint_holds(finished: Path) -> None:
    fingerprint = open_cache(finished).fingerprint
    assert set(fingerprint) == {
        "tokenizer",
        "template",
        "sequence",
        "images",
        "teacher",
        "engine",
        "capture",
        "data",
    }
    assert fingerprint["sequence"]["max_length"] == 2048
    assert fingerprint["engine"]["name"] == "hf"
    assert fingerprint["images"]["aspect"] == "pad"
    assert fingerprint["capture"]["vocab_size"] == 400
    assert str(finished.parent) not in json.dumps(fingerprint)
