"""What a set records about its writer: the log-prob of each written token, which model wrote it, and in which round."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from llavamod_offline.data.sample import Generated, sample_from_json, sample_to_json
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from teacher_cache.generate import decode_loop
from teacher_cache.generate.decode_loop import Written
from teacher_cache.generate.generated_set import AnsweredSample
from teacher_cache.read.reader import open_cache
from teacher_cache.write.merge import merge_caches
from tests.teacher_cache.generate.reference import Place, rows
from tests.tiny import tiny_samples

WARM = ("generate.temperature=1.0", "capture.precision=exact")


@pytest.mark.parametrize("turns", ["last", "all"])
def test_the_writers_log_probs_are_those_that_a_capture_by_the_writer_finds(place: Place, turns: str) -> None:
    """Token for token, including the one that ends the answer."""
    place.generate(*WARM, f"generate.turns={turns}")
    cache = open_cache(place.cache())
    for sample in rows(place.set()):
        assert sample.generated is not None
        written = sample.generated.behaviour_log_probs
        assert len(written) == (1 if turns == "last" else len(sample.turns) // 2)
        given = np.concatenate([own for own in written if own is not None])
        if None in written:
            continue
        found_N = cache.records([(sample.key, "response")]).target_log_probs_N
        np.testing.assert_allclose(given, found_N[-len(given) :], atol=2e-3)
        if turns == "all":
            assert len(given) == len(found_N)


def test_greedy_answers_have_the_models_own_log_probs(greedy: Place) -> None:
    cache = open_cache(greedy.cache())
    for sample in rows(greedy.set()):
        assert sample.generated is not None
        (given,) = sample.generated.behaviour_log_probs
        found_N = cache.records([(sample.key, "response")]).target_log_probs_N
        assert given is not None
        np.testing.assert_allclose(given, found_N[-len(given) :], atol=2e-2)


def test_a_text_that_is_read_as_other_tokens_has_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavamod_offline.demo.plan import TEACHER
    from llavamod_offline.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(TEACHER)
    letters = tuple(tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in " yes")
    answer = Written(letters, ended=True, log_probs=(-0.5,) * 5)
    monkeypatch.setattr(decode_loop, "write_answers", lambda engine, prompts, decoding: [answer] * len(prompts))
    assert place.generate().retokenised > 0
    for sample in rows(place.set()):
        assert sample.generated is not None
        assert sample.generated.behaviour_log_probs == (None,)


def test_writer_and_round_are_in_set_samples_and_caches(place: Place, greedy: Place) -> None:
    """Also in a merged cache; sets without a round and sets that no model wrote lack these fields."""
    place.generate(*WARM, "generate.round=2", "generate.key_suffix=-r2")
    about = SampleSet.open(place.set()).manifest["generated"]
    assert about["generate"]["round"] == 2
    sample = rows(place.set())[0]
    assert sample.generated is not None
    assert sample.generated.round == 2
    fingerprint = open_cache(place.cache()).fingerprint
    assert fingerprint["data"]["round"] == 2
    assert fingerprint["data"]["writer"] == sample.generated.teacher
    assert "round" not in open_cache(greedy.cache()).fingerprint["data"]
    assert "writer" not in about["data"]
    place.generate("capture.precision=exact", name="first")
    merge_caches([open_cache(place.cache()), open_cache(place.cache("first"))], str(place.folder / "both"))
    merged = open_cache(place.folder / "both").fingerprint["data"]
    assert (merged["writer"], merged["round"]) == (sample.generated.teacher, [2, None])
    with pytest.raises(ConfigError, match=r"generate.round is 0: must be at least 1"):
        place.generate("generate.round=0", name="other")
    with pytest.raises(ConfigError, match=r"was generated with other settings: generate.round: was 2, now 3"):
        place.generate(*WARM, "generate.round=3", "generate.key_suffix=-r2")


def test_a_sample_keeps_it_and_older_ones_do_without() -> None:
    made = Generated("t", "s", "k", "last", 1.0, 1.0, 9, 0, round=3, behaviour_log_probs=((-0.5, -1.25), None))
    sample = dataclasses.replace(tiny_samples(1)[0], generated=made)
    assert sample_from_json(sample.key, sample_to_json(sample), sample.images).generated == made
    old = dataclasses.replace(sample, generated=Generated("t", "s", "k", "last", 1.0, 1.0, 9, 0))
    assert set(json.loads(sample_to_json(old))["generated"]) == {
        "teacher",
        "set_digest",
        "key",
        "turns",
        "temperature",
        "top_p",
        "max_new_tokens",
        "seed",
    }
    assert sample_from_json(old.key, sample_to_json(old), old.images).generated == old.generated


def test_answers_that_an_earlier_version_kept_are_read() -> None:
    row = {"key": "a", "texts": ["x"], "tokens": 3, "retokenised": False, "kind": None, "reason": ""}
    assert AnsweredSample.from_json(row) == AnsweredSample("a", ("x",), (), 3)
