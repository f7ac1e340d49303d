"""Encoding a question for a LLaVA student and decoding its answer, for every engine that runs one.

Shape suffixes: G generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Turn
from llavamod_offline.errors import EvalError


def prompt_ids(encoder: SequenceEncoder, example: Example[Any], max_new_tokens: int) -> list[int]:
    """Tokenize a question, its image first. Errors: `EvalError` if it leaves no space for an answer."""
    if IMAGE_PLACEHOLDER in example.prompt:
        raise EvalError(f"question '{example.id}': remove '{IMAGE_PLACEHOLDER}' from its text: it marks an image")
    text = f"{IMAGE_PLACEHOLDER}\n{example.prompt}" if example.source is not None else example.prompt
    ids: list[int] = encoder.encode_prompt([Turn("user", text)]).tolist()
    if len(ids) + max_new_tokens > encoder.max_length:
        raise EvalError(
            f"question '{example.id}': {len(ids)} tokens and an answer of up to {max_new_tokens} do not fit the "
            f"model's {encoder.max_length} positions: set max_new_tokens lower"
        )
    return ids


def read_answer(encoder: SequenceEncoder, ids_G: Sequence[int]) -> Answer:
    """The text before the end token."""
    ids = list(ids_G)
    stopped = encoder.end_id in ids
    if stopped:
        ids = ids[: ids.index(encoder.end_id)]
    text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(str(text).strip(), len(ids), "stop" if stopped else "length")
