"""Samples → sequences: token ids with expanded image tokens, and the indices of the supervised tokens.

Shape suffixes: T tokens of a sequence, N supervised tokens. If the token at index t is supervised, the distribution
that predicts it is the model's output at index t − 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.plain_text import PlainText
from llavamod_offline.data.encode.template import Segment, Template
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]
Positions = Literal["response", "all"]
NO_TARGET = -1  # the target of a position that has none, such as an image patch
UNSUPERVISED = -100  # the label of an unsupervised token in transformers
_NO_IDS: Ids = np.zeros(0, np.int64)


@dataclass(frozen=True)
class TokenizedSequence:
    """A tokenized (sample, role). `supervised_N`: increasing indices into `input_ids_T`, all ≥ 1."""

    key: str
    role: str
    input_ids_T: Ids
    supervised_N: Ids

    @property
    def target_ids_N(self) -> Ids:
        """The supervised token ids, in order."""
        return self.input_ids_T[self.supervised_N]

    @property
    def target_hash(self) -> str:
        """`hash_ids` of the supervised ids: equal for every student that can use a record."""
        return hash_ids(self.target_ids_N)

    @property
    def prediction_rows_N(self) -> Ids:
        """The rows of the model's output that predict the supervised tokens: `supervised_N − 1`."""
        return self.supervised_N - 1

    def rows_and_targets(self, positions: Positions) -> tuple[Ids, Ids]:
        """The recorded rows of the model's output, and the supervised token that each predicts.

        `response`: the rows that predict supervised tokens. `all`: every row, `NO_TARGET` where it predicts none.
        """
        if positions == "response":
            return self.prediction_rows_N, self.target_ids_N
        targets_T = np.full(len(self.input_ids_T), NO_TARGET, np.int64)
        targets_T[self.prediction_rows_N] = self.target_ids_N
        return np.arange(len(self.input_ids_T)), targets_T


@dataclass(frozen=True)
class ImageTokens:
    """How one image is written in a sequence: its ids, and plain text beside them that joins the neighbouring text.

    Embeddings replace those of `ids` that are the model's image token; the others (frames, rows, columns) stay.
    """

    ids: Ids
    before: str = ""
    after: str = ""


def hash_ids(ids_N: Ids) -> str:
    """SHA-256 (hex) of token ids as little-endian int64."""
    return hashlib.sha256(ids_N.astype("<i8").tobytes()).hexdigest()


class SequenceEncoder:
    """Turns samples into sequences for one tokenizer, template and image size.

    `images` of `encode`: the tokens of each image (default: `image_tokens` of them, as in LLaVA models).
    `image_frame`: the ids before and after the tokens of each image (none in LLaVA). `add_start`: begin with what the
    tokenizer puts before every text, such as Llama's `<s>`, unless the template does so itself.
    Errors: `ModelError` if the tokenizer lacks a special token of the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        *,
        image_token_id: int,
        image_tokens: int,
        max_length: int,
        image_frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
        add_start: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.image_frame = image_frame
        self._special_ids: dict[str, int] = {}
        # The plain texts of every prompt, and their ids once tokenized.
        self._wording: dict[str, Ids | None] = dict.fromkeys(_fixed_texts(template))
        self.end_id = self._special_id(template.end)
        self.plain = PlainText(tokenizer)
        self.start_ids = self._start_ids() if add_start else ()

    def image(self, tokens: int) -> ImageTokens:
        """An image of this many tokens."""
        ids = np.full(tokens, self.image_token_id, np.int64)
        before, after = self.image_frame
        return ImageTokens(np.r_[before, ids, after].astype(np.int64) if before or after else ids)

    def encode(self, sample: Sample, role: str, images: Sequence[ImageTokens] | None = None) -> TokenizedSequence:
        """Tokenize one role of a sample.

        Errors: `DataError` if it is longer than `max_length`, or the template cannot word its system turn or tools.
        """
        images = images or [self.image(self.image_tokens)] * len(sample.images)
        ids_T, supervised_N = self._tokenize(self._segments(sample, role), list(images))
        if len(ids_T) > self.max_length:
            raise DataError(
                f"sample '{sample.key}' ({role}): {len(ids_T)} tokens, more than max_length {self.max_length}"
            )
        return TokenizedSequence(sample.key, role, ids_T, supervised_N)

    def length(self, sample: Sample, role: str) -> int:
        """Count the tokens of one role of a sample, however many they are. Errors: as `encode`."""
        images = [self.image(self.image_tokens)] * len(sample.images)
        return len(self._tokenize(self._segments(sample, role), images)[0])

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[ImageTokens] | None = None) -> Ids:
        """Tokenize turns that end with the user, up to the start of the answer (for generation)."""
        placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        images = images or [self.image(self.image_tokens)] * placeholders
        ids_T, _ = self._tokenize(self.template.render(turns), list(images))
        return ids_T

    def answer_ids(self, text: str) -> Ids:
        """Tokenize plain text as the beginning of an answer."""
        turns = (Turn("user", ""), Turn("assistant", ""))
        *_, before, _, _ = [Segment(""), *_merge_plain(self.template.render(turns))]  # the prompt's end, answer, end
        return self.plain.following(text, "" if before.special else before.text, first=False)

    def _segments(self, sample: Sample, role: str) -> list[Segment]:
        try:
            return self.template.render(sample.conversation(role))
        except DataError as error:
            raise DataError(f"sample '{sample.key}' ({role}): {error}") from error

    def _tokenize(self, segments: list[Segment], images: list[ImageTokens]) -> tuple[Ids, Ids]:
        """The ids of all segments, and the indices of the supervised ones."""
        pieces: list[Ids] = [np.array(self.start_ids, np.int64)]
        supervised: list[Ids] = [_NO_IDS]
        length = len(self.start_ids)
        first, context = True, ""  # whether no special token or image has come yet; the plain text since the last one
        for segment in _merge_plain(segments):
            if segment.special:
                found = [np.array([self._special_id(segment.text)], np.int64)]
                first, context = False, ""
            elif segment.supervised:
                found = [self.plain.following(segment.text, context, first=first)]
                context += segment.text
            else:
                found, context, first = self._ids_with_images(segment.text, images, context, first=first)
            pieces += found
            before, length = length, length + sum(map(len, found))
            if segment.supervised:
                supervised.append(np.arange(before, length))
        return np.concatenate(pieces), np.concatenate(supervised)

    def _ids_with_images(
        self, text: str, images: list[ImageTokens], context: str, *, first: bool
    ) -> tuple[list[Ids], str, bool]:
        """The ids of a prompt's text; then `context` and `first` after it, as in `_tokenize`."""
        text, *others = text.split(IMAGE_PLACEHOLDER)
        pieces: list[Ids] = []
        for following in others:
            image = images.pop(0)
            pieces += [self._prompt_ids(text + image.before, context, first=first), image.ids]
            text, context, first = image.after + following, "", False
        pieces.append(self._prompt_ids(text, context, first=first))
        return pieces, context + text, first

    def _prompt_ids(self, text: str, context: str, *, first: bool) -> Ids:
        """Tokenize plain text of a prompt, caching the template's own texts."""
        if text not in self._wording or self.plain.depends_on_place:
            return self.plain.following(text, context, first=first)
        known = self._wording[text]
        if known is None:
            known = self._wording[text] = self.plain.section(text, first=first)
        return known

    def _start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text, if the template does not begin with it."""
        found = tuple(self.plain.start_ids().tolist())
        opening = self.template.render((Turn("user", ""),))[:1]
        own = bool(opening) and opening[0].special and found == (self._special_id(opening[0].text),)
        return () if own else found

    def _special_id(self, token: str) -> int:
        if token not in self._special_ids:
            token_id = self.tokenizer.convert_tokens_to_ids(token)
            if token_id is None or self.tokenizer.convert_ids_to_tokens(token_id) != token:
                raise ModelError(f"the tokenizer has no token '{token}', which template '{self.template.name}' needs")
            self._special_ids[token] = int(token_id)
        return self._special_ids[token]


def _merge_plain(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring unsupervised plain segments, so that a prompt is tokenized as one text."""
    merged: list[Segment] = []
    for segment in segments:
        plain = not (segment.special or segment.supervised)
        if plain and merged and not (merged[-1].special or merged[-1].supervised):
            merged[-1] = Segment(merged[-1].text + segment.text)
        else:
            merged.append(segment)
    return merged


def _fixed_texts(template: Template) -> set[str]:
    """The template's own plain texts between images, special tokens and answers."""
    turns = (Turn("user", IMAGE_PLACEHOLDER), Turn("assistant", "")) * 2
    plain = [part for part in _merge_plain(template.render(turns)) if not (part.special or part.supervised)]
    return {text for part in plain for text in part.text.split(IMAGE_PLACEHOLDER) if text}
