"""How a model's text denotes an image, and the tokens of what its processor writes there."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from llavamod_offline.data.encode.chat_probes import parts_of_text, rendered_as
from llavamod_offline.data.encode.plain_text import PlainText
from llavamod_offline.data.encode.tokenize import Ids, ImageTokens
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEXT = "The text"
_FRAMES = (("vision_start_token_id", "vision_end_token_id"), ("image_start_token_id", "image_end_token_id"))


def written_image(tokenizer: PreTrainedTokenizerFast, image_token: str, config: Any) -> str:
    """The text of one image before its processor expands `image_token` in it, such as `<|vision_start|>…`.

    The chat template determines it, or else the tokens that config.json names as the image's start and end.
    """
    try:
        bare, shown = (
            rendered_as(tokenizer, [Turn("user", text)], parts_of_text) for text in (_TEXT, IMAGE_PLACEHOLDER + _TEXT)
        )
        before = next((n for n, (a, b) in enumerate(zip(bare, shown, strict=False)) if a != b), len(bare))
        after = len(bare) - bare.rindex(_TEXT)
        found = shown[before : len(shown) - after].strip("\n ")
        if found.count(image_token) == 1:
            return found
    except Exception:  # there is no chat template, or one without images
        pass
    for start, end in _FRAMES:
        ids = [getattr(config, start, None), getattr(config, end, None)]
        frame = [None if number is None else tokenizer.convert_ids_to_tokens(number) for number in ids]
        if all(frame):
            return f"{frame[0]}{image_token}{frame[1]}"
    return image_token


class TokenWriter:
    """Turns what a processor writes for an image into tokens; repeated texts come from a cache."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: str, image_token: str) -> None:
        self._tokenizer = tokenizer
        self._plain = PlainText(tokenizer)
        self._around = written.split(image_token, 1)
        self._ids = dict(tokenizer.get_added_vocab())
        names = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._found = lru_cache(1024)(self._write)

    def __call__(self, replacement: str) -> ImageTokens:
        """The tokens of one image."""
        return self._found(replacement)

    def _write(self, replacement: str) -> ImageTokens:
        pieces = self._special.split(replacement.join(self._around))
        if len(pieces) == 1:
            return ImageTokens(np.zeros(0, np.int64), before=pieces[0])
        before, *middle, after = pieces
        ids: list[Ids] = []
        for number, piece in enumerate(middle):
            if number % 2 == 0:
                ids.append(np.array([self._ids[piece]], np.int64))
            elif piece:
                ids.append(self._plain.section(piece, first=False))
        return ImageTokens(np.concatenate(ids), before, after)
