"""A tokenizer's tokens as one string of a fingerprint, to compare vocabularies token by token.

The string is base85 (RFC 1924) of the zlib-compressed JSON `[tokens, added]`: the tokens by id, null where there is
none, and the ids of the added tokens.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """A vocabulary: its tokens by id, and the ids of those that were added to the model's."""

    texts: tuple[str | None, ...]
    added: frozenset[int]

    @classmethod
    def of(cls, vocabulary: Mapping[str, int], added: Mapping[str, int]) -> Tokens:
        """The tokens of a vocabulary (added ones too), and of its added tokens, both with ids."""
        texts: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            texts[number] = token
        return cls(tuple(texts), frozenset(added.values()))

    def pack(self) -> str:
        """Everything in one string."""
        content = json.dumps([self.texts, sorted(self.added)], ensure_ascii=False, separators=(",", ":"))
        return base64.b85encode(zlib.compress(content.encode("utf-8", "surrogatepass"), 9)).decode()

    @classmethod
    def unpack(cls, packed: str) -> Tokens:
        """What `pack` made."""
        texts, added = json.loads(zlib.decompress(base64.b85decode(packed)).decode("utf-8", "surrogatepass"))
        return cls(tuple(texts), frozenset(added))

    def differing(self, other: Tokens) -> tuple[list[int], list[int]]:
        """The ids below both ends at which the tokens differ, and those at which only one is an added token."""
        shared = range(min(len(self.texts), len(other.texts)))
        tokens = [number for number in shared if self.texts[number] != other.texts[number]]
        apart = self.added ^ other.added
        return tokens, [number for number in shared if number in apart and self.texts[number] == other.texts[number]]
