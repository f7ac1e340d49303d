"""Tokens' bytes, against the tokenizers' own decoders."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llavamod_offline.errors import ConfigError
from teacher_cache.fingerprint import added_tokens
from teacher_cache.other_tokenizer.token_bytes import token_bytes
from teacher_cache.student.token_list import Tokens
from tests.teacher_cache.other_tokenizer.tokenizers import END, pieces, said, tokenizer

NAMES = sorted(END)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_the_tokens_of_any_text_say_its_bytes(name: str, text: str) -> None:
    found = pieces(name).join(said(name, text)[:-1])
    spaced = name == "llama" and text != ""  # Llama's tokenizer prepends a space to a text
    assert found == (" " * spaced + text).encode()


def test_each_kind_reads_its_own_marks() -> None:
    llama, byte_level = pieces("llama"), pieces("byte400")
    number = tokenizer("llama").convert_tokens_to_ids
    assert llama.pieces[number("<0x0A>")] == b"\n"
    assert llama.pieces[number("▁")] == b" "
    assert llama.pieces[number("</s>")] == b"</s>"
    assert byte_level.pieces[tokenizer("byte400").convert_tokens_to_ids("Ġthe")] == b" the"
    assert byte_level.pieces[tokenizer("byte400").convert_tokens_to_ids("<|im_end|>")] == b"<|im_end|>"


def test_an_ordinary_token_stands_for_its_bytes_before_a_lone_byte() -> None:
    llama = pieces("llama")
    assert llama.ids[b"a"] == tokenizer("llama").convert_tokens_to_ids("a")
    assert llama.ids[b"\x80"] == tokenizer("llama").convert_tokens_to_ids("<0x80>")


def test_ids_beyond_the_size_are_left_out() -> None:
    made = tokenizer("byte400")
    tokens = Tokens.of(made.get_vocab(), added_tokens(made))
    found = token_bytes(tokens, size=300, whose="the student's")
    assert len(found.pieces) == 300
    assert max(found.ids.values()) < 300


def test_another_kind_is_refused() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    made = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ConfigError, match=r"other_tokenizer: the teacher's tokenizer is neither"):
        token_bytes(Tokens.of(made.get_vocab(), {}), size=3, whose="the teacher's")
