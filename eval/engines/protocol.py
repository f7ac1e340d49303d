"""The interface of answer engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eval.example import Example


@dataclass(frozen=True)
class Answer:
    """A model's answer: text without special tokens, tokens before the end; `finish`: "stop" or "length"."""

    text: str
    n_tokens: int
    finish: str


class AnswerEngine(Protocol):
    """A model that answers questions."""

    def describe(self) -> dict[str, Any]:
        """Everything about the model and its decoding that determines the answers, as JSON values."""
        ...

    def answer(self, examples: Sequence[Example[Any]], max_new_tokens: int) -> list[Answer]:
        """Answer a batch of questions greedily."""
        ...
