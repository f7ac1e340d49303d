"""What makes a valid sample, and that it survives a round trip through its JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llavamod_offline.data.sample import Sample, Turn, sample_from_json, sample_to_json
from llavamod_offline.errors import DataError
from tests.tiny import tiny_image, tiny_samples

ASK, ANSWER = Turn("user", "What?"), Turn("assistant", "That.")
SHOW = Turn("user", "<image>\nWhat?")
PNG = tiny_image(0)
SYSTEM = Turn("system", "Answer in French.")
NO_TEXT = Turn("assistant", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("preference", [False, True])
def test_json_round_trip(preference: bool) -> None:
    first = tiny_samples(1, preference=preference)[0]
    for sample in (*tiny_samples(12, preference=preference), dataclasses.replace(first, turns=(SYSTEM, *first.turns))):
        content = sample_to_json(sample)
        assert sample_from_json(sample.key, content, sample.images) == sample
        assert json.loads(content)["content_hash"] == sample.content_hash


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"key": "a/b"}, "a key must be"),
        ({"key": "a.b"}, "a key must be"),
        ({"key": ""}, "a key must be"),
        ({"key": "k" * 201}, "a key must be"),
        ({"turns": ()}, "the conversation is empty"),
        ({"turns": (ANSWER,)}, "turn 0 is by 'assistant'"),
        ({"turns": (ASK,)}, "the last turn is by 'user'"),
        ({"turns": (ASK, ASK, ANSWER)}, "turn 1 is by 'user'"),
        ({"turns": (SYSTEM,)}, "the last turn is by 'system'"),
        ({"turns": (SYSTEM, ANSWER)}, "turn 1 is by 'assistant', expected 'user'"),
        ({"turns": (ASK, ANSWER, SYSTEM)}, "turn 2 is by 'system', expected 'user'"),
        ({"turns": (Turn("system", "<image>"), ASK, ANSWER)}, "is in the system turn"),
        ({"turns": (ASK, Turn("assistant", " \n"))}, "the assistant's text is empty"),
        ({"turns": (ASK, NO_TEXT)}, "not a string"),
        ({"turns": (Turn("user", "half \ud800 a pair"), ANSWER)}, "surrogate"),
        ({"turns": (SHOW, ANSWER)}, "1 '<image>' in the text for 0 image"),
        ({"images": (PNG,), "image_extensions": ("png",)}, "0 '<image>' in the text for 1 image"),
        ({"turns": (ASK, Turn("assistant", "an <image>"))}, "is in an answer"),
        ({"turns": (SHOW, ANSWER), "images": (PNG,), "image_extensions": ()}, "of extensions differ"),
        ({"turns": (SHOW, ANSWER), "images": (PNG,), "image_extensions": ("bmp",)}, "'bmp' is none of"),
        ({"chosen": "good", "rejected": "bad"}, "the last turn is by 'assistant'"),
        ({"turns": (ASK,), "chosen": "good", "rejected": ""}, "response is empty"),
        ({"turns": (ASK,), "chosen": "<image>", "rejected": "bad"}, "is in an answer"),
    ],
)
def test_what_makes_no_sample(change: dict[str, object], problem: str) -> None:
    fields: dict[str, object] = {"key": "k", "turns": (ASK, ANSWER)} | change
    with pytest.raises(DataError) as caught:
        Sample(**fields)  # type: ignore[arg-type]
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"sample '{fields['key']}'")


def test_content_hash_covers_text_and_images_but_not_the_key() -> None:
    sample = Sample("k", (SHOW, ANSWER), (PNG,), ("png",))
    assert dataclasses.replace(sample, key="other").content_hash == sample.content_hash
    others = [
        dataclasses.replace(sample, images=(tiny_image(1),)),
        dataclasses.replace(sample, turns=(SHOW, Turn("assistant", "This."))),
        Sample("k", (SHOW,), (PNG,), ("png",), "That.", "This."),
        Sample("k", (SHOW,), (PNG,), ("png",), "This.", "That."),
    ]
    assert len({sample.content_hash, *(other.content_hash for other in others)}) == 5


def test_roles_and_their_conversations() -> None:
    conversation = Sample("k", (ASK, ANSWER))
    pair = Sample("k", (ASK,), chosen="good", rejected="bad")
    assert conversation.roles == ("response",)
    assert conversation.conversation("response") == (ASK, ANSWER)
    assert pair.roles == ("chosen", "rejected")
    assert pair.conversation("rejected") == (ASK, Turn("assistant", "bad"))
    with pytest.raises(DataError, match="no role 'response': it has chosen, rejected"):
        pair.conversation("response")


@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_an_unpaired_answer_is_half_of_a_pair(answer: str) -> None:
    half = Sample("k", (ASK,), **{answer: "good"})  # type: ignore[arg-type]
    assert (half.roles, half.is_preference) == ((answer,), True)
    assert half.conversation(answer) == (ASK, Turn("assistant", "good"))
    assert sample_from_json("k", sample_to_json(half), ()) == half
    both = Sample("k", (ASK,), chosen="good", rejected="good")
    assert len({half.content_hash, both.content_hash, Sample("k", (ASK, Turn("assistant", "good"))).content_hash}) == 3
    with pytest.raises(DataError, match="the chosen or the rejected response is empty"):
        Sample("k", (ASK,), **{answer: " "})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "its JSON cannot be read"),
        (b"[]", "not a sample of format 1"),
        (b'{"format": 2}', "not a sample of format 1"),
        (b'{"format": 1}', "bad field"),
        (b'{"format": 1, "turns": [["user"]], "images": []}', "bad field"),
        (b"\xff", "its JSON cannot be read"),
    ],
)
def test_foreign_json(content: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        sample_from_json("k", content, ())
