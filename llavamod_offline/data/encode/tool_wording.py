"""Conversations with tools, worded by a tokenizer's chat template.

Chat templates word tools in too many ways for a `Template`, so conversations are rendered whole, with a mark in place
of each text by the system, the user or the assistant. Each rendering is checked against those without marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.encode.chat_probes import own_chat_template, segments_of
from llavamod_offline.data.encode.template import Segment, Template
from llavamod_offline.data.sample import Turn
from llavamod_offline.data.tools import calls_turn, result_turn, to_message, tools_turn
from llavamod_offline.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = (
    tools_turn([{"name": "the_tool", "description": "", "parameters": {"type": "object", "properties": {}}}]),
    Turn("user", "[the question]"),
    calls_turn([{"name": "the_call", "arguments": {"the_argument": "the_value"}, "id": "call12345"}]),
    result_turn("[the result]", name="the_call", tool_call_id="call12345"),
    Turn("assistant", "[the answer]"),
)
_PROBE_WORDS = ("the_tool", "the_call", "the_argument", "the_value", "[the result]")


@dataclass(frozen=True)
class ToolWording:
    """Renders conversations with tools by a tokenizer's chat template; `parts`: texts are given as lists of parts."""

    tokenizer: PreTrainedTokenizerFast
    parts: bool

    @property
    def chat_template(self) -> str:
        """The tokenizer's chat template for conversations with tools."""
        return own_chat_template(self.tokenizer, tools=True)

    def __call__(self, template: Template, turns: Sequence[Turn]) -> list[Segment]:
        """The segments of a conversation, or of a prompt. Errors: `DataError` if it cannot be worded faithfully."""
        for turn in turns:
            if turn.role not in ("system", "user", "assistant"):
                token = next((token for token in self.tokenizer.get_added_vocab() if token in turn.text), None)
                if token is not None:
                    raise DataError(f"the {turn.role} turn has the text '{token}', which is a token of the template")
        texts = [template.strip(turn) for turn in turns]
        marks = [f"[mark {place} of {len(turns)}]" for place in range(len(turns))]
        marked = [
            Turn(turn.role, mark) if turn.role in ("system", "user", "assistant") else turn
            for turn, mark in zip(turns, marks, strict=True)
        ]
        is_prompt = turns[-1].role != "assistant"
        whole = self._rendered(marked, answer=is_prompt)
        pattern = "|".join(map(re.escape, marks))
        pieces = re.split(f"({pattern})", whole)
        if pieces[1::2] != [turn.text for turn in marked if turn.text in marks] or self._rendered(
            turns, answer=is_prompt
        ) != re.sub(pattern, lambda found: texts[marks.index(found[0])], whole):
            raise DataError("the chat template words its tools and turns in a way that cannot be reproduced")
        return self._segments(template, marked, texts, pieces)

    def bytes_around(self, template: Template) -> tuple[int, int]:
        """Upper bounds on the bytes added to a sample's own texts: once for its tools, and per turn."""
        question, answer = _PROBE[1], _PROBE[-1]
        plain, tools, calls = (
            sum(len(segment.text.encode()) for segment in segments)
            for segments in (
                template.render((question, answer)),
                self(template, (_PROBE[0], question, answer)),
                self(template, _PROBE[1:]),
            )
        )
        return max(tools - plain, 0), max(calls - plain, 0)

    def _segments(
        self, template: Template, marked: Sequence[Turn], texts: Sequence[str], pieces: Sequence[str]
    ) -> list[Segment]:
        """`pieces`: the text around the marks, and the marks themselves at odd indices."""
        places = {turn.text: place for place, turn in enumerate(marked)}
        segments: list[Segment] = []
        after_answer = False
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                words = piece
                if after_answer:
                    if not words.startswith(template.end):
                        raise DataError(f"an answer does not end with '{template.end}' in the chat template")
                    segments.append(Segment(template.end, supervised=True, special=True))
                    words = words.removeprefix(template.end)
                    if number == len(pieces) - 1 and words.strip() == template.separator.strip():
                        words = ""  # what separates rounds
                segments += segments_of(self.tokenizer, words)
                continue
            place = places[piece]
            after_answer = marked[place].role == "assistant"
            if not after_answer:
                segments.append(Segment(texts[place]))
                continue
            before = "".join(pieces[:number])
            if before != self._rendered(marked[:place], answer=True) + template.answer_prefix:
                raise DataError("the chat template rewords the turns before an answer once the answer is added")
            if template.answer_prefix:
                last = segments.pop()
                segments.append(Segment(last.text.removesuffix(template.answer_prefix), special=last.special))
            segments.append(Segment(template.answer_prefix + texts[place], supervised=True))
        return segments

    def _rendered(self, turns: Sequence[Turn], *, answer: bool) -> str:
        tools: list[Any] | None = None
        messages: list[dict[str, Any]] = []
        for turn in turns:
            if turn.role == "tools":
                tools = json.loads(turn.text)
            elif turn.role in ("tool_calls", "tool"):
                messages.append(to_message(turn))
            else:
                content = [{"type": "text", "text": turn.text}] if self.parts else turn.text
                messages.append({"role": turn.role, "content": content})
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
            )
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template fails on its tools: {first_line(error)}") from error


def find_tool_wording(tokenizer: PreTrainedTokenizerFast, template: Template) -> ToolWording | None:
    """How a chat template words tools; None if it omits tools, calls or results, or cannot be split into segments."""
    for parts in (False, True):
        wording = ToolWording(tokenizer, parts)
        try:
            text = "".join(segment.text for segment in wording(template, _PROBE))
        except DataError:
            continue
        if all(word in text for word in _PROBE_WORDS):
            return wording
    return None
