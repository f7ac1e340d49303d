"""Questions as prompts for a model's family, and its answers as text, for every engine that runs one.

Shape suffixes: G generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.keys import key_from_id
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import EvalError
from llavamod_offline.families import Family
from llavamod_offline.models.checkpoint import id_count

_ANSWER = "-"  # stands in for the answer
_KEY_LENGTH = 200  # a sample's longest allowed key


def asked_sample(example: Example[Any]) -> Sample:
    """A question as a sample, its image first. Errors: `EvalError` for an image that cannot be read."""
    if IMAGE_PLACEHOLDER in example.prompt:
        raise EvalError(f"question '{example.id}': remove '{IMAGE_PLACEHOLDER}' from its text: it marks an image")
    images = () if example.source is None else (example.source.read(),)
    text = f"{IMAGE_PLACEHOLDER}\n" * len(images) + example.prompt
    turns = (Turn("user", text), Turn("assistant", _ANSWER))
    return Sample(key_from_id(example.id)[:_KEY_LENGTH], turns, images, ("png",) * len(images))


def prompt_sequence(family: Family, sample: Sample, max_new_tokens: int) -> TokenizedSequence:
    """Tokenize a question up to where its answer begins. Errors: `EvalError` if it leaves no space for an answer."""
    sequence = family.encode(sample, "response")
    ids_T = sequence.input_ids_T[: sequence.supervised_N[0]]
    if len(ids_T) + max_new_tokens > family.context_length:
        raise EvalError(
            f"question '{sample.key}': {len(ids_T)} tokens and an answer of up to {max_new_tokens} do not fit the "
            f"model's {family.context_length} positions: set max_new_tokens lower"
        )
    return replace(sequence, input_ids_T=ids_T, supervised_N=np.zeros(0, np.int64))


def never_answers(family: Family) -> list[int]:
    """Ids that no answer may contain: the image token, and rows of the LM head beyond the tokenizer."""
    image = [] if family.image_token_id is None else [family.image_token_id]
    return [*image, *range(id_count(family.encoder.tokenizer), family.head_rows)]


def read_answer(encoder: SequenceEncoder, ids_G: Sequence[int]) -> Answer:
    """The text before the end token."""
    ids = list(ids_G)
    stopped = encoder.end_id in ids
    if stopped:
        ids = ids[: ids.index(encoder.end_id)]
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(str(text).strip(), len(ids), "stop" if stopped else "length")
