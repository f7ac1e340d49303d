"""How a tokenizer's chat template words a system turn, found by rendering marked turns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llavamod_offline.data.encode.chat_probes import Form, rendered_as
from llavamod_offline.data.encode.template import Segment, SystemTurn, Template
from llavamod_offline.data.sample import Turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

_SYSTEM = "[the system]"
_TURNS = tuple(Turn("assistant" if number % 2 else "user", f"[turn {number}]") for number in range(4))


def find_system_turn(
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    segments: Callable[[str], tuple[Segment, ...]],
    form: Form,
) -> SystemTurn | None:
    """The text around a system turn; None if the chat template has none, or words the other turns differently with one.

    `template`: the chat template's other parts; `segments` splits text into plain pieces and special tokens; `form`:
    how the chat template takes texts.
    """
    around = set()
    for count in range(1, len(_TURNS) + 1):
        turns = _TURNS[:count]
        prompt = count % 2 == 1
        try:
            rendered = rendered_as(tokenizer, (Turn("system", _SYSTEM), *turns), form, answer=prompt)
        except Exception:  # a template may raise anything
            return None
        rest = "".join(segment.text for segment in replace(template, system=()).render(turns))
        rest += "" if prompt or not rendered.endswith(template.separator) else template.separator
        before, marker, after = rendered.removesuffix(rest).partition(_SYSTEM)
        if not rendered.endswith(rest) or not marker:
            return None
        around.add((before, after))
    if len(around) != 1:
        return None
    before, after = around.pop()
    return segments(before), segments(after)
