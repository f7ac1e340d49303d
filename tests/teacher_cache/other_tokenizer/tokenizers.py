"""Tokenizers of several kinds and sizes, with what a bridge needs from them."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerFast

from teacher_cache.fingerprint import added_tokens
from teacher_cache.other_tokenizer.bridge import TokenizerBridge
from teacher_cache.other_tokenizer.token_bytes import TokenBytes, token_bytes
from teacher_cache.student.token_list import Tokens
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import llama_tokenizer

END = {"byte400": "<|im_end|>", "byte300": "<|endoftext|>", "llama": "</s>"}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 400 or 300 tokens, or a SentencePiece-like one with byte fallback."""
    return llama_tokenizer() if name == "llama" else tiny_tokenizer(int(name.removeprefix("byte")))


@cache
def pieces(name: str) -> TokenBytes:
    """The bytes of a tokenizer's tokens."""
    made = tokenizer(name)
    tokens = Tokens.of(made.get_vocab(), added_tokens(made))
    return token_bytes(tokens, size=len(made), whose="the student's")


@cache
def bridge(teacher: str, student: str) -> TokenizerBridge:
    """The bridge between two of the tokenizers."""
    ends = (end_id(teacher), end_id(student))
    return TokenizerBridge.of(pieces(teacher), pieces(student), ends)


def end_id(name: str) -> int:
    """The id that ends a turn."""
    found = tokenizer(name).convert_tokens_to_ids(END[name])
    assert isinstance(found, int)
    return found


def said(name: str, *answers: str) -> list[int]:
    """The supervised ids of the answers."""
    ids: list[int] = []
    for answer in answers:
        ids += [*tokenizer(name)(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
        ids.append(end_id(name))
    return ids
