"""The bytes that a tokenizer's tokens stand for, from its list of tokens alone.

Two kinds of tokenizers reveal this: byte-level BPE, whose characters each stand for one byte (GPT-2's table), and
SentencePiece, where `▁` is a space and `<0x0A>` a byte, in added tokens as well. Other added tokens stand for their own
text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llavamod_offline.errors import ConfigError
from teacher_cache.student.token_list import Tokens

_SPACE, _BYTE = "▁", re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """`pieces`: the bytes of each id, None where there is no token. `ids`: the id that stands for some bytes.

    Of several tokens with the same bytes, `ids` prefers an ordinary one, then an added one, then a lone byte.
    """

    pieces: tuple[bytes | None, ...]
    ids: Mapping[bytes, int]

    def join(self, ids: list[int]) -> bytes:
        """The bytes of some tokens, one after another."""
        return b"".join(self.pieces[number] or b"" for number in ids)


def token_bytes(tokens: Tokens, *, size: int, whose: str) -> TokenBytes:
    """The bytes of the tokens with ids below `size`.

    Errors: `ConfigError` naming `whose` tokenizer it is, if it is of another kind (WordPiece).
    """
    texts = tokens.texts[:size]
    ordinary = [text for number, text in enumerate(texts) if text is not None and number not in tokens.added]
    alphabet = _byte_level_alphabet()
    sentence_piece = any(_SPACE in text for text in ordinary)
    byte_level = any("Ġ" in text for text in ordinary) and all(sign in alphabet for text in ordinary for sign in text)
    if not sentence_piece and not byte_level:
        raise ConfigError(
            f"cache.other_tokenizer: {whose} tokenizer is neither byte-level BPE nor SentencePiece, so the bytes of "
            "its tokens are not known: remove it, and use a student with the teacher's tokenizer"
        )
    pieces: list[bytes | None] = [None] * len(texts)
    ranks: list[tuple[int, int]] = []  # of each token: ordinary, added or a lone byte; its id
    for number, text in enumerate(texts):
        if text is None:
            continue
        byte = _BYTE.fullmatch(text) if sentence_piece else None
        if byte is not None:
            pieces[number] = bytes([int(byte[1], 16)])
        elif sentence_piece:
            pieces[number] = text.replace(_SPACE, " ").encode()
        elif number in tokens.added:
            pieces[number] = text.encode("utf-8", "surrogatepass")
        else:
            pieces[number] = bytes(alphabet[sign] for sign in text)
        ranks.append((2 if byte is not None else int(number in tokens.added), number))
    ids: dict[bytes, int] = {}
    for _, number in sorted(ranks):
        piece = pieces[number]
        if piece:
            ids.setdefault(piece, number)
    return TokenBytes(tuple(pieces), ids)


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: GPT-2's `bytes_to_unicode`, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
