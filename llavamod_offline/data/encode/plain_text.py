"""Tokenize the pieces of a text so that together they give the tokens of the whole text.

Byte-level tokenizers give a piece the same ids anywhere. Llama's put a space before what they consider the beginning of
a text, so a piece that continues a text must be tokenized as its continuation. A section is the text between two
special tokens or images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Ids = NDArray[np.int64]
_NO_IDS: _Ids = np.zeros(0, np.int64)
_ANCHORS = ("\n", ":", "0", "a")


class PlainText:
    """Plain text → ids; names of special tokens in it stay plain characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        alone = self._ids("x")
        self.depends_on_place = self._continued("x") != alone
        self._spaced_sections = not self.depends_on_place or self._section_after_special() == alone

    def section(self, text: str, *, first: bool) -> _Ids:
        """Tokenize the beginning of a section; `first`: of the whole text."""
        spaced = first or self._spaced_sections
        return np.array(self._ids(text) if spaced else self._continued(text), np.int64) if text else _NO_IDS

    def following(self, text: str, context: str, *, first: bool) -> _Ids:
        """Tokenize what follows `context` in a section."""
        if not self.depends_on_place or not (text and context):
            return self.section(text, first=first)
        head, whole = self.section(context, first=first), self.section(context + text, first=first)
        if np.array_equal(whole[: len(head)], head):
            return whole[len(head) :]
        return np.array(self._continued(text), np.int64)  # a token would span both, which generation cannot produce

    def start_ids(self) -> _Ids:
        """The ids that the tokenizer itself puts before a text, such as Llama's `<s>`."""
        text = self._ids("x")
        whole = list(self.tokenizer("x")["input_ids"])
        at = next((n for n in range(len(whole)) if whole[n : n + len(text)] == text), 0)
        return np.array(whole[:at], np.int64)

    def _continued(self, text: str) -> list[int]:
        """The ids of a text after another one."""
        for anchor in _ANCHORS:
            head, whole = self._ids(anchor), self._ids(anchor + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)

    def _section_after_special(self) -> list[int]:
        """The ids of "x" right after a special token, which need not be those of "x" alone."""
        for number, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                found = self._ids(f"{token}x", special=True)
                if found[:1] == [number]:
                    return found[1:]
        return self._ids("x")

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        # As `tokenizer(text, add_special_tokens=False, split_special_tokens=not special)`, without its overhead.
        backend = self.tokenizer.backend_tokenizer
        if backend.encode_special_tokens == special:
            backend.encode_special_tokens = not special
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return list(backend.encode(text, add_special_tokens=False).ids)
