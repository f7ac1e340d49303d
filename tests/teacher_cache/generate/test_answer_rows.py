"""Answers of the toy teacher: equal to plain generation, whatever the batch, and what happens to unusable ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llavamod_offline.data.sample import Generated, Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.demo.plan import TEACHER
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.fingerprint import describe_data
from teacher_cache.generate import decode_loop as answers
from teacher_cache.generate.answer_rows import Answerer
from teacher_cache.generate.decode_loop import Written
from teacher_cache.generate.generated_set import AnsweredSample
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import count_reads
from tests.teacher_cache.generate.reference import SOURCE_SAMPLES, Place, Reference, rows


def test_greedy_answers_are_those_of_plain_generate_and_replace_the_last_turn(greedy: Place) -> None:
    reference = Reference()
    manifest = json.loads((greedy.set() / "set.json").read_text())
    about = manifest["generated"]
    before = SampleSet.open(greedy.source)
    shards = describe_data(before)["shards"]
    assert about["data"] == {"digest": before.digest, "samples": SOURCE_SAMPLES, "shards": shards}
    assert about["teacher"] == open_cache(greedy.cache()).fingerprint["teacher"]
    assert about["generate"] == {
        "turns": "last",
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 80,
        "seed": 0,
        "key_suffix": "-generated",
    }
    for old, new in zip(rows(greedy.source), rows(greedy.set()), strict=True):
        assert new.key == f"{old.key}-generated"
        assert (new.turns[:-1], new.images, new.source) == (old.turns[:-1], old.images, old.source)
        assert new.turns[-1].text == reference.answer(old.turns[:-1], old.images)
        assert isinstance(new.generated, Generated)
        assert (new.generated.key, new.generated.set_digest) == (old.key, before.digest)
        assert (new.generated.temperature, new.generated.max_new_tokens, new.generated.turns) == (0.0, 80, "last")
    assert not list(greedy.folder.glob(".*"))


def test_each_written_token_is_the_likeliest_of_its_record(greedy: Place) -> None:
    """The capture saw the same prompt and the same answer, in different batches."""
    cache = open_cache(greedy.cache())
    reference = Reference()
    for sample in rows(greedy.set()):
        answer = Sample("it", (Turn("user", "?"), sample.turns[-1]))
        length = len(reference.encoder.encode(answer, "response").target_ids_N)
        records = cache.records([(sample.key, "response")]).split(
            [1] * cache.sequence(sample.key, "response").n_positions
        )
        for record in records[-length:]:
            assert record.topk_ids_H[0] == record.target_ids_N[0]
            assert np.isclose(record.topk_log_probs_H[0], record.target_log_probs_N[0], atol=1e-3)


def test_all_turns_follow_one_another(place: Place) -> None:
    done = place.generate("generate.turns=all", "generate.key_suffix=", "batch_size=3")
    assert done.samples == SOURCE_SAMPLES
    reference = Reference()
    for old, new in zip(rows(place.source), rows(place.set()), strict=True):
        assert new.key == old.key
        turns: list[Turn] = []
        for turn in old.turns:
            turns.append(turn if turn.role == "user" else Turn("assistant", reference.answer(turns, old.images)))
        assert new.turns == tuple(turns)


def test_every_turn_has_random_numbers_of_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def watched(engine: Any, prompts: Any, decoding: Any) -> list[Written]:
        asked.extend((prompt.key, prompt.stream) for prompt in prompts)
        return write(engine, prompts, decoding)

    write = answers.write_answers
    monkeypatch.setattr(answers, "write_answers", watched)
    place.generate("generate.turns=all", "generate.temperature=1.0")
    assert len(set(asked)) == len(asked) > SOURCE_SAMPLES


def test_sampled_answers_are_the_same_whatever_the_batch(place: Place, greedy: Place) -> None:
    warm = ("generate.temperature=1.0", "generate.top_p=0.95")
    digests = [place.generate(*warm, f"batch_size={size}", name=f"b{size}").digest for size in (1, 4, 16)]
    assert len(set(digests)) == 1
    other = place.generate(*warm, "generate.seed=1", name="other")
    assert other.digest not in digests
    assert SampleSet.open(greedy.set()).digest not in digests


def test_answers_that_make_no_sample_are_rejected_with_the_reason(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind once; the others are kept, including one whose text is tokenised differently."""
    tokenizer = load_tokenizer(TEACHER)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    part = next(number for number in range(len(tokenizer)) if tokenizer.decode([number]) == "\ufffd")
    letters = tuple(encode(letter)[0] for letter in " yes")
    assert tokenizer.decode(letters) == " yes"
    assert encode(" yes") != letters
    said = {
        "toy-0": Written((), ended=True),
        "toy-1": Written(encode(" \n"), ended=True),
        "toy-2": Written(encode(" A red"), ended=False),
        "toy-3": Written((*encode(" A"), part), ended=True),
        "toy-4": Written((*encode(" A"), tokenizer.convert_tokens_to_ids("<|im_end|>")), ended=True),
        "toy-5": Written(encode(" A red"), ended=False, finite=False),
        "toy-6": Written(letters, ended=True),
        "toy-7": Written(encode(" A <ima") + encode("ge> circle"), ended=True),
    }
    right = Written(encode(" A red circle."), ended=True)
    monkeypatch.setattr(
        answers, "write_answers", lambda engine, prompts, decoding: [said.get(prompt.key, right) for prompt in prompts]
    )
    done = place.generate()
    assert (done.samples, done.rejected, done.retokenised) == (2, 7, 1)
    assert done.rejected_by_kind == {"unfinished answer": 1, "unusable answer": 6}
    lines = [json.loads(line) for line in (place.set() / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["toy-0"] == reasons["toy-1"] == "the answer is empty"
    assert reasons["toy-2"] == "the answer did not end within generate.max_new_tokens=80"
    assert reasons["toy-3"] == "the answer's tokens do not decode to text: they hold only part of a character"
    assert reasons["toy-4"].startswith("the answer holds the special token '<|im_end|>'; template 'qwen' ends with")
    assert reasons["toy-5"] == "the teacher's logits are not finite (NaN or inf)"
    assert "'<image>' is in an answer" in reasons["toy-7"]
    assert [(line["file"], line["row"]) for line in lines[:2]] == [("samples", 0), ("samples", 1)]
    assert [sample.turns[-1].text for sample in rows(place.set())] == ["yes", "A red circle."]
    assert set(open_cache(place.cache()).keys("response")) == {"toy-6-generated", "toy-8-generated"}


def test_long_answers_and_long_prompts_are_rejected(place: Place) -> None:
    """An unfinished answer does not count as finished; a prompt that leaves no room is not truncated."""
    done = place.generate("generate.max_new_tokens=4")
    assert set(done.rejected_by_kind) == {"unfinished answer"}
    assert 0 < done.samples < SOURCE_SAMPLES
    longest = max(len(Reference().encoder.encode(sample, "response").input_ids_T) for sample in rows(place.source))
    done = place.generate(f"max_length={longest - 8}", name="short")
    lines = [json.loads(line) for line in (place.set("short") / "rejected.jsonl").read_text().splitlines()]
    assert any("tokens, more than max_length" in line["reason"] for line in lines)
    with pytest.raises(ConfigError, match=r"of 9 rows rejected, more than"):
        place.generate("generate.max_new_tokens=4", "max_rejected=0.01", name="strict")
    assert not place.set("strict").exists()


def test_answers_take_one_read_of_each_member(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many turns are written; packing and capturing the new set read them again."""
    reads = count_reads(monkeypatch)
    found: list[dict[tuple[str, int], int]] = []

    def counted(answerer: Answerer, numbers: Sequence[int]) -> list[AnsweredSample]:
        reads.clear()
        done = answer(answerer, numbers)
        found.append(dict(reads))
        return done

    answer = Answerer.answer
    monkeypatch.setattr(Answerer, "answer", counted)
    place.generate("generate.turns=all")
    members = SampleSet.open(place.source).index.column("members").to_pylist()
    assert sum(map(len, found)) == sum(map(len, members))
    assert all(set(counts.values()) == {1} for counts in found)
