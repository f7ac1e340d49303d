"""Tokens, image tokens and supervised positions of sequences."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError, ModelError
from tests.tiny import tiny_image, tiny_samples, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IMAGE_ID = TOKENIZER.convert_tokens_to_ids("<image>")
IMAGE_TOKENS = 9
PNG = tiny_image(0)


def encoder(template: str = "qwen", max_length: int = 2048) -> SequenceEncoder:
    return SequenceEncoder(
        TOKENIZER,
        get_template(template),
        image_token_id=IMAGE_ID,
        image_tokens=IMAGE_TOKENS,
        max_length=max_length,
    )


def conversation(*texts: str, images: int = 0) -> Sample:
    turns = tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
    return Sample("k", turns, (PNG,) * images, ("png",) * images)


def text_at(sequence: TokenizedSequence, places: NDArray[np.int64] | slice) -> str:
    return str(TOKENIZER.decode(sequence.input_ids_T[places].tolist()))


@pytest.mark.parametrize("template", ["qwen", "chatml"])
def test_one_token_answer(template: str) -> None:
    """The row that predicts the first and only answer token is the prompt's last one."""
    word = "." if template == "chatml" else "7"
    sequence = encoder(template).encode(conversation("<image>\nWhich number?", word, images=1), "response")
    prompt = encoder(template).encode_prompt([Turn("user", "<image>\nWhich number?")])
    end = get_template(template).end
    answer = TOKENIZER(get_template(template).answer_prefix + word)["input_ids"]
    expected = [*prompt.tolist(), *answer, TOKENIZER.convert_tokens_to_ids(end)]
    assert sequence.input_ids_T.tolist() == expected
    assert sequence.supervised_N.tolist() == list(range(len(prompt), len(expected)))
    assert sequence.prediction_rows_N[0] == len(prompt) - 1
    assert sequence.target_ids_N.tolist() == expected[len(prompt) :]
    if template == "chatml":
        assert len(sequence.supervised_N) == 2  # the token and the end


@pytest.mark.parametrize("template", ["qwen", "chatml"])
def test_two_turns_supervise_both_answers_and_their_ends(template: str) -> None:
    sequence = encoder(template).encode(conversation("Colour?", "It is red.", "Sure?", "Yes."), "response")
    end, prefix = get_template(template).end, get_template(template).answer_prefix
    assert text_at(sequence, sequence.supervised_N) == f"{prefix}It is red.{end}{prefix}Yes.{end}"
    rest = np.setdiff1d(np.arange(len(sequence.input_ids_T)), sequence.supervised_N)
    assert "red" not in text_at(sequence, rest)
    assert "Sure?" in text_at(sequence, rest)
    assert int((sequence.target_ids_N == TOKENIZER.convert_tokens_to_ids(end)).sum()) == 2


def test_prompt_is_what_precedes_the_answer() -> None:
    for sample in tiny_samples(12):
        sequence = encoder().encode(sample, "response")
        prompt = encoder().encode_prompt(sample.turns[:-1])
        assert sequence.input_ids_T[: len(prompt)].tolist() == prompt.tolist()
        assert len(prompt) in sequence.supervised_N
        assert len(prompt) - 1 not in sequence.supervised_N


def test_image_in_the_middle_of_the_text() -> None:
    sample = conversation("Look at <image> and at <image>, please.", "Done.", images=2)
    ids = encoder().encode(sample, "response").input_ids_T
    places = np.flatnonzero(ids == IMAGE_ID)
    assert len(places) == 2 * IMAGE_TOKENS
    first, second = places[:IMAGE_TOKENS], places[IMAGE_TOKENS:]
    assert np.all(np.diff(first) == 1)
    assert np.all(np.diff(second) == 1)
    between = TOKENIZER.decode(ids[first[-1] + 1 : second[0]].tolist())
    assert between == " and at "
    assert TOKENIZER.decode(ids[: first[0]].tolist()).endswith("USER: Look at ")


@pytest.mark.parametrize("template", ["qwen", "chatml"])
def test_wording_that_is_known_by_heart_changes_nothing(template: str) -> None:
    """An encoder that tokenises every piece gives the same ids, for the first and for every later sample."""
    samples = [
        conversation("<image>", "7", "<image>", "8", images=2),
        conversation("Look: <image>\nWhich number?", "7", "And\n<image>this?", "8.", images=2),
        conversation("user\n", "assistant\n", "\n", " ASSISTANT:"),
    ]
    quick, plain = encoder(template), encoder(template)
    plain._wording = {}
    assert quick._wording
    for sample in samples * 2:
        found, expected = (one.encode(sample, "response") for one in (quick, plain))
        assert found.input_ids_T.tolist() == expected.input_ids_T.tolist()
        assert found.supervised_N.tolist() == expected.supervised_N.tolist()
    assert all(ids is not None for ids in quick._wording.values())


def test_image_token_counts_may_differ() -> None:
    sample = conversation("<image> or <image>?", "Done.", images=2)
    made = encoder()
    ids = made.encode(sample, "response", [made.image(2), made.image(5)]).input_ids_T
    assert np.diff(np.flatnonzero(ids == IMAGE_ID)).tolist().count(1) == 5
    assert int((ids == IMAGE_ID).sum()) == 7


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
def test_names_of_special_tokens_in_text_stay_text(name: str) -> None:
    special = TOKENIZER.convert_tokens_to_ids(name)
    sequence = encoder().encode(conversation(f"What is {name}?", f"It is {name}, a token."), "response")
    ends = 1 if name == get_template("qwen").end else 0
    assert int((sequence.input_ids_T == special).sum()) == ends
    assert f"What is {name}?" in text_at(sequence, slice(None))


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda text: text.strip() and "<image>" not in text))
def test_any_answer_is_supervised_whole(text: str) -> None:
    sequence = encoder().encode(conversation("Say it.", text), "response")
    assert sequence.supervised_N.tolist() == list(range(sequence.supervised_N[0], len(sequence.input_ids_T)))
    assert sequence.target_ids_N[-1] == TOKENIZER.convert_tokens_to_ids("<|endoftext|>")
    assert text_at(sequence, sequence.supervised_N[:-1]) == " " + text


def test_target_hash_is_of_the_supervised_ids_alone() -> None:
    answer = "It is red."
    short = encoder().encode(conversation("Colour?", answer), "response")
    long = encoder().encode(conversation("<image>\nWhich colour does it have?", answer, images=1), "response")
    other = encoder().encode(conversation("Colour?", "It is blue."), "response")
    assert short.target_hash == long.target_hash != other.target_hash
    packed = struct.pack(f"<{len(short.target_ids_N)}q", *short.target_ids_N.tolist())
    assert short.target_hash == hashlib.sha256(packed).hexdigest()


def test_preference_roles() -> None:
    sample = Sample("k", (Turn("user", "Colour?"),), chosen="It is red.", rejected="It is blue.")
    chosen, rejected = (encoder().encode(sample, role) for role in sample.roles)
    assert text_at(chosen, chosen.supervised_N) == " It is red.<|endoftext|>"
    assert text_at(rejected, rejected.supervised_N) == " It is blue.<|endoftext|>"
    assert chosen.supervised_N[0] == rejected.supervised_N[0]


def test_too_long_is_an_error_and_never_cut() -> None:
    sample = conversation("Colour?", "It is red.")
    length = len(encoder().encode(sample, "response").input_ids_T)
    assert len(encoder(max_length=length).encode(sample, "response").input_ids_T) == length
    with pytest.raises(DataError, match=f"sample 'k' .response.: {length} tokens, more than max_length {length - 1}"):
        encoder(max_length=length - 1).encode(sample, "response")


def test_tokenizer_without_the_templates_token() -> None:
    template = dataclasses.replace(get_template("qwen"), end="<|nowhere|>")
    with pytest.raises(ModelError, match=r"no token '<\|nowhere\|>', which template 'qwen' needs"):
        SequenceEncoder(TOKENIZER, template, image_token_id=IMAGE_ID, image_tokens=9, max_length=64)
