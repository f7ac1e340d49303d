"""Labels of token ids, and tokens as running text, for reports on a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BROKEN = "\ufffd"  # the result of decoding part of a character
_MOST_PARTS = 12


@dataclass(frozen=True)
class Piece:
    """One token in running text. `kind`: `text`; `special`; `part` of a character shown at an earlier token; `name` for
    a token without text."""

    text: str
    kind: str


class TokenNames:
    """Labels ids with the tokenizer of a checkpoint folder, or by number without one. Errors: `ModelError`."""

    def __init__(self, folder: Path | None) -> None:
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self._special: set[int] = set()
        if folder is not None:
            from llavamod_offline.models.checkpoint import load_tokenizer
            from llavamod_offline.models.hub import checkpoint_folder

            self.tokenizer = load_tokenizer(checkpoint_folder(folder))
            self._special = set(self.tokenizer.get_added_vocab().values())

    def label(self, number: int) -> str:
        """A label that shows white space and distinguishes tokens without text."""
        if number < 0:  # a position without a token, such as an image patch's
            return "none"
        if self.tokenizer is None:
            return f"#{number}"
        text = self._decoded([number])
        # Part of a character has no text: its byte-level name identifies it.
        return repr(text) if _BROKEN not in text else f"<{self.tokenizer.convert_ids_to_tokens(number)}>"

    def pieces(self, numbers: Sequence[int]) -> list[Piece]:
        """Tokens as running text; a character made of several tokens is shown at the first of them."""
        found: list[Piece] = []
        while len(found) < len(numbers):
            at = len(found)
            first = self._piece(numbers[at])
            count = 1
            if first.kind == "name" and self.tokenizer is not None:
                for length in range(2, min(_MOST_PARTS, len(numbers) - at) + 1):
                    text = self._decoded(numbers[at : at + length])
                    if _BROKEN not in text:
                        first, count = Piece(text, "text"), length
                        break
            found += [first, *(Piece("·", "part") for _ in range(count - 1))]
        return found

    def _piece(self, number: int) -> Piece:
        if self.tokenizer is None or number < 0:
            return Piece(self.label(number), "name")
        text = self._decoded([number])
        if number in self._special:
            return Piece(text, "special")
        return Piece(self.label(number), "name") if _BROKEN in text or not text else Piece(text, "text")

    def _decoded(self, numbers: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(numbers)))
