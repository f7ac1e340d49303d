"""The fingerprint: which differences it reports, which it ignores, and in what words."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.errors import CacheError, ConfigError, ModelError, TargetError
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.fingerprint import (
    check_allowed,
    describe_template,
    describe_tokenizer,
    describe_weights,
    differences,
)
from teacher_cache.read.reader import open_cache
from teacher_cache.student.check import check_encoding, check_sequence, check_student
from teacher_cache.student.end_of_turn import TokenIdSwap
from teacher_cache.write.store import CacheStore
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
    theirs, mine = fingerprint["tokenizer"], describe_tokenizer(student)
    said = {
        "merges": f"tokenizer.merges: cache {theirs['merges'][:16]}…, student {mine['merges'][:16]}…",
        "vocabulary": "tokenizer.vocabulary: 2 differing: id 0 is '!' in the cache, '\"' in the student; id 1 is ",
        "added_tokens": "tokenizer.vocabulary: 1 differing: id 396 is '<|endoftext|>' in the cache, '<|end|>' in the ",
    }
    assert said[change] in str(caught.value)
    assert "\n" not in str(caught.value)
    check_student(fingerprint, student, allow=["tokenizer"])
    fields = [f"tokenizer.{name}" for name in ("merges", "vocabulary", "added_tokens")]
    check_student(fingerprint, student, allow=fields)
    field = "vocabulary" if change == "added_tokens" else change
    others = [each for each in fields if each != f"tokenizer.{field}"]
    with pytest.raises(CacheError, match=field):
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
        "a.x: was 1, now 2",
        "a.y: was [1, 2], now [1, 3]",
        "c.only: was here, now unset",
    ]
    assert differences(left, right, allow=["a", "c.only"]) == []
    assert differences(left, right, allow=["a.x", "c"]) == ["a.y: was [1, 2], now [1, 3]"]


def test_what_earlier_caches_did_not_say_is_no_difference(finished: Path, tmp_path: Path) -> None:
    """A cache begun by an earlier version is continued; one with a different value is not."""
    now = open_cache(finished).fingerprint
    earlier = copy.deepcopy(now)
    for name in ("head_dtype", "device"):
        del earlier["engine"][name]
    assert differences(earlier, now) == differences(now, earlier) == []
    CacheStore.open(tmp_path, earlier, ["a"]).start()
    assert CacheStore.open(tmp_path, now, ["a"]).job["fingerprint"] == earlier
    other = copy.deepcopy(now)
    other["engine"].update(head_dtype="bfloat16", device="cuda")
    assert differences(now, other) == [
        "engine.device: was cpu, now cuda",
        "engine.head_dtype: was float32, now bfloat16",
    ]
    del earlier["engine"]["dtype"]
    assert differences(earlier, now) == ["engine.dtype: was unset, now float32"]


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
    assert set(fingerprint["engine"]) == {"name", "dtype", "head_dtype", "device", "torch", "transformers"}
    said = [fingerprint["engine"][name] for name in ("name", "dtype", "head_dtype", "device")]
    assert said == ["hf", "float32", "float32", "cpu"]
    assert fingerprint["images"]["aspect"] == "pad"
    assert fingerprint["capture"]["vocab_size"] == 400
    assert str(finished.parent) not in json.dumps(fingerprint)


def _encoder(template: str = "qwen", **settings: Any) -> SequenceEncoder:
    chosen = {"image_token_id": 399, "image_tokens": 9, "max_length": 2048, **settings}
    return SequenceEncoder(tiny_tokenizer(), get_template(template), **chosen)


def _of_all_positions(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(fingerprint))
    changed["capture"]["positions"] = "all"
    return changed


OTHER_ENCODINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"template": "chatml"}, ("template.name", "template.sha256", "template.system_turn")),
    ({"max_length": 1024}, ("sequence.max_length",)),
    ({"image_tokens": 16}, ("images.tokens",)),
    ({"image_token_id": 3}, ("images.token_id",)),
]


@pytest.mark.parametrize(("settings", "fields"), OTHER_ENCODINGS)
def test_prompts_may_differ_unless_they_have_records(
    finished: Path, settings: dict[str, Any], fields: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    fingerprint = open_cache(finished).fingerprint
    student = _encoder(**settings)
    check_encoding(fingerprint, student)
    everything = _of_all_positions(fingerprint)
    check_encoding(everything, _encoder())
    with pytest.raises(CacheError) as caught:
        check_encoding(everything, student)
    for field in fields:
        assert f"{field}: cache " in str(caught.value)
    assert str(caught.value).count(": cache ") == len(fields)
    with caplog.at_level(logging.WARNING):
        check_encoding(everything, student, allow=[fields[0].split(".")[0]])
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(": cache ")[0] for message in messages] == [f"allowed: {field}" for field in fields]


def test_only_fields_that_exist_can_be_allowed(finished: Path) -> None:
    fingerprint = open_cache(finished).fingerprint
    check_allowed(["template", "capture.top_k", "images.size.shortest_edge", "images.size"], fingerprint)
    with pytest.raises(ConfigError, match=r"no field 'tokenizer.vocabluary': did you mean 'tokenizer.vocabulary'\?"):
        check_student(fingerprint, tiny_tokenizer(), allow=["tokenizer.vocabluary"])


END, OTHER = "<|im_end|>", "<|endoftext|>"


def _teacher(change: str) -> dict[str, Any]:
    """The fingerprint of a teacher with the tiny tokenizer except for its end-of-turn token."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    added = {entry["content"]: entry for entry in content["added_tokens"]}
    if change == "renamed":
        added[OTHER]["content"] = "<|eot|>"
    elif change == "exchanged":
        added[OTHER]["content"], added[END]["content"] = END, OTHER
    elif change == "one more":
        content["added_tokens"].append({**added[OTHER], "id": 400, "content": "<|eot|>"})
    elif change == "one less":
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<image>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    return {"tokenizer": describe_tokenizer(tokenizer), "capture": {"positions": "response"}}


@pytest.mark.parametrize(
    ("change", "end_of_turn", "swap"),
    [
        ("none", f"{END}={OTHER}", TokenIdSwap(398, 396)),
        ("renamed", f"<|eot|>={OTHER}", TokenIdSwap(396, 396)),
        ("exchanged", f"{END}={OTHER}", TokenIdSwap(396, 396)),
        ("one more", f"<|eot|>={OTHER}", TokenIdSwap(400, 396)),
        ("one less", f"{OTHER}=<image>", TokenIdSwap(396, 399)),
    ],
)
def test_a_declared_end_of_turn_is_the_one_thing_that_may_differ(
    change: str, end_of_turn: str, swap: TokenIdSwap
) -> None:
    teacher = _teacher(change)
    student = tiny_tokenizer()
    assert student.convert_tokens_to_ids([OTHER, END, "<image>"]) == [396, 398, 399]
    assert check_student(teacher, student, end_of_turn=end_of_turn) == swap
    if change not in ("none", "one less", "one more"):
        with pytest.raises(CacheError, match=r"tokenizer\.vocabulary: .*declare its end of turn"):
            check_student(teacher, student)
    other = json.loads(student.backend_tokenizer.to_str())
    other["added_tokens"][1]["content"] = "<|pad|>"
    with pytest.raises(
        CacheError, match=r"tokenizer\.vocabulary: 1 differing: id 397 is '.*' in the cache, '<\|pad\|>'"
    ):
        check_student(
            teacher,
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other))),
            end_of_turn=end_of_turn,
        )


def _longer(*tokens: str) -> PreTrainedTokenizerFast:
    longer = tiny_tokenizer()
    longer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return longer


def test_a_student_may_have_more_tokens_behind_the_teachers() -> None:
    """Such as `<image>`, when the teacher writes images with tokens of its own."""
    teacher = _teacher("none")
    student = _longer("<|more|>", "<|still more|>")
    assert len(student) == 402
    assert check_student(teacher, student) is None
    assert check_student(teacher, student, end_of_turn=f"{END}={OTHER}") == TokenIdSwap(398, 396)
    assert check_student(teacher, student, end_of_turn=f"{END}=<|more|>") == TokenIdSwap(398, 400)
    swapped = json.loads(student.backend_tokenizer.to_str())
    swapped["added_tokens"][0]["content"], swapped["added_tokens"][-1]["content"] = "<|still more|>", OTHER
    with pytest.raises(CacheError, match=r"tokenizer\.vocabulary: "):
        check_student(teacher, PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(swapped))))


def _described(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"tokenizer": describe_tokenizer(tokenizer), "capture": {"positions": "response"}}


def test_a_teacher_may_have_more_tokens_behind_the_students() -> None:
    """Such as LLaVA-OneVision's `<video>`, which a student on its base model lacks."""
    teacher = _described(_longer("<video>", "<more>"))
    assert check_student(teacher, tiny_tokenizer()) is None
    assert check_student(teacher, tiny_tokenizer(), end_of_turn=f"{END}={OTHER}") == TokenIdSwap(398, 396)


def test_tokens_that_differ_before_the_end_of_both_are_named() -> None:
    with pytest.raises(CacheError) as caught:
        check_student(_described(_longer("<video>", "<a>", "<b>")), _longer("<c>", "<a>"))
    assert "tokenizer.vocabulary: 1 differing: id 400 is '<video>' in the cache, '<c>' in the student: " in str(
        caught.value
    )
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for entry in content["added_tokens"][1:]:  # an extra token in the middle shifts those after it
        entry["id"] += 1
    content["added_tokens"].insert(1, {**content["added_tokens"][0], "id": 397, "content": "<|new|>"})
    moved = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    for teacher, student in ((moved, tiny_tokenizer()), (tiny_tokenizer(), moved)):
        with pytest.raises(CacheError, match=r"3 differing: id 397 is '<\|.*id 398 is .*id 399 is ") as caught:
            check_student(_described(teacher), student)
        assert "<|new|>" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_token_that_is_special_on_one_side_is_named() -> None:
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    plain = [token for token, number in content["model"]["vocab"].items() if number == 300]
    content["added_tokens"].insert(0, {**content["added_tokens"][0], "id": 300, "content": plain[0]})
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(CacheError, match=r"tokenizer\.added_tokens: 1 added on one side only: id 300 '.*student\)"):
        check_student(_described(tiny_tokenizer()), other)


def test_a_cache_without_a_list_of_tokens_is_compared_by_hashes() -> None:
    """As caches of earlier versions are."""
    teacher = _described(tiny_tokenizer())
    del teacher["tokenizer"]["tokens"]
    assert check_student(teacher, _longer("<more>")) is None
    with pytest.raises(CacheError, match=r"tokenizer\.vocabulary: cache \w+…, student \w+…"):
        check_student(teacher, _changed("vocabulary"))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("<|im_end|>", "expected TEACHER_TOKEN=STUDENT_TOKEN"),
        ("=<|im_end|>", "expected TEACHER_TOKEN=STUDENT_TOKEN"),
        ("<|im_end|>=<|eot|>", "the student's tokenizer has no token '<|eot|>'"),
    ],
)
def test_an_end_of_turn_that_means_nothing_is_refused(finished: Path, setting: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_student(open_cache(finished).fingerprint, tiny_tokenizer(), end_of_turn=setting)
    assert problem in str(caught.value)


def test_the_declared_end_must_be_the_students_own(finished: Path) -> None:
    fingerprint = open_cache(finished).fingerprint
    check_encoding(fingerprint, _encoder("chatml"), end_of_turn=f"{OTHER}={END}")
    with pytest.raises(ConfigError, match=r"ends answers with '<\|im_end\|>', not with '<\|endoftext\|>'"):
        check_encoding(fingerprint, _encoder("chatml"), end_of_turn=f"{END}={OTHER}")


def test_templates_that_differ_in_the_declared_end_alone_fit_a_cache_of_all_positions(finished: Path) -> None:
    everything = _of_all_positions(open_cache(finished).fingerprint)
    student = _encoder()
    student.template = replace(student.template, name="mine", end=END)
    with pytest.raises(CacheError, match=r"template\.sha256"):
        check_encoding(everything, student)
    check_encoding(everything, student, end_of_turn=f"{OTHER}={END}")
    student.template = replace(student.template, separator="\n")
    with pytest.raises(CacheError, match=r"template\.sha256"):
        check_encoding(everything, student, end_of_turn=f"{OTHER}={END}")


def test_supervised_ids_are_compared_as_the_exchange_reads_them(finished: Path) -> None:
    cache = open_cache(finished)
    (key,) = [key for key in cache.keys("response") if key.endswith("0002")]
    theirs = cache.target_ids(key, "response")
    assert np.flatnonzero(theirs == 396).tolist() == [10, 13]  # two turns

    def sequence(*replaced: tuple[int, int]) -> TokenizedSequence:
        ids = np.concatenate([[7], theirs])
        for index, number in replaced:
            ids[index + 1] = number
        return TokenizedSequence(key, "response", ids, np.arange(1, len(ids)))

    check_sequence(cache, sequence())
    mine = sequence((10, 398), (13, 398))
    check_sequence(cache, mine, TokenIdSwap(396, 398))
    with pytest.raises(
        TargetError, match=r"at position 10 the cache has 396 of 14, the student 398 .*cache\.end_of_turn"
    ):
        check_sequence(cache, mine)
    with pytest.raises(TargetError, match=r"at position 13 the cache has 398 of 14, the student 396 of 14"):
        check_sequence(cache, sequence((10, 398)), TokenIdSwap(396, 398))
    with pytest.raises(TargetError, match=r"at position 3 ") as caught:
        check_sequence(cache, sequence((3, 5), (13, 398)))
    assert "end_of_turn" not in str(caught.value)


def test_every_token_of_a_sequence_must_be_there_if_all_have_records(finished: Path) -> None:
    """The same supervised ids, but one more token before them: the records would belong to other rows."""
    cache = open_cache(finished)
    theirs = cache.target_ids("tiny-0000", "response")
    length = cache.sequence("tiny-0000", "response").n_tokens
    whole, longer = (
        TokenizedSequence(
            "tiny-0000",
            "response",
            np.concatenate([np.full(total - len(theirs), 7), theirs]),
            np.arange(total - len(theirs), total),
        )
        for total in (length, length + 1)
    )
    check_sequence(cache, longer)
    cache.fingerprint = _of_all_positions(cache.fingerprint)
    check_sequence(cache, whole)
    with pytest.raises(TargetError, match=f"{length + 1} tokens, but {length} in the cache"):
        check_sequence(cache, longer)
