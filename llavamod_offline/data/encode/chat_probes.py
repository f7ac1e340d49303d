"""Compare a tokenizer's chat template with a `Template` by rendering marked turns, with and without images."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavamod_offline.data.encode.template import ROLES, Segment, Template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TWO = f"{IMAGE_PLACEHOLDER}\n" * 2
TURNS = tuple(Turn("assistant" if number % 2 else "user", f"The turn {number}") for number in range(6))
_WITH_IMAGES = (
    (Turn("user", f"{IMAGE_PLACEHOLDER}\nThe turn 0"),),
    (Turn("user", f"{_TWO}The turn 0"),),
    (Turn("user", f"{IMAGE_PLACEHOLDER}\nThe turn 0"), TURNS[1], Turn("user", f"{_TWO}The turn 2")),
)
_LOG = logging.getLogger(__name__)
_STRIPPED = sorted(  # all or no roles, then one or two
    (roles for count in range(len(ROLES) + 1) for roles in itertools.combinations(ROLES, count)),
    key=lambda roles: 0 < len(roles) < len(ROLES),
)
Form = Callable[[str], "str | list[dict[str, str]]"]  # a turn's text as the content of a message


def _plain_text(text: str) -> str:
    return text


def parts_of_text(text: str) -> list[dict[str, str]]:
    """A message's content as parts; text keeps the newline after an image."""
    pieces = re.split(f"({re.escape(IMAGE_PLACEHOLDER)})", text)
    return [
        {"type": "image"} if piece == IMAGE_PLACEHOLDER else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def _parts_without_newlines(text: str) -> list[dict[str, str]]:
    """The same for a template that adds the newline after an image by itself."""
    return parts_of_text(text.replace(f"{IMAGE_PLACEHOLDER}\n", IMAGE_PLACEHOLDER))


FORMS: tuple[Form, ...] = (_plain_text, parts_of_text)


def rendered_as(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], form: Form, *, answer: bool = False) -> str:
    """Render turns by the chat template; `answer`: up to where the next answer begins. Errors: whatever it raises."""
    messages = [{"role": turn.role, "content": form(turn.text)} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))


def own_chat_template(tokenizer: PreTrainedTokenizerFast, *, tools: bool = False) -> str:
    """The chat template in use; if there are several named ones, the one that `apply_chat_template` chooses."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("tool_use" if tools and "tool_use" in own else "default") or next(iter(own.values()), "")
    return str(own or "")


def renders_alike(template: Template, tokenizer: PreTrainedTokenizerFast, form: Form) -> bool:
    """Whether both render prompts and conversations of every length alike.

    After the last answer a chat template may add a separator, or omit an end token that the model writes anyway.
    """
    implied = template.end in model_ends(tokenizer)
    for count in range(1, len(TURNS) + 1):
        prompt = count % 2 == 1
        rendered, text = rendered_as(tokenizer, TURNS[:count], form, answer=prompt), _text(template, TURNS[:count])
        if rendered == text or (not prompt and rendered == text + template.separator):
            continue
        if prompt or not implied or rendered.rstrip() + template.end != text:
            return False
    return True


def model_ends(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokens that end an answer, according to a model's folder."""
    try:
        settings = json.loads((Path(tokenizer.name_or_path) / "generation_config.json").read_text())
        ids = settings.get("eos_token_id") or []
        return [str(tokenizer.convert_ids_to_tokens(int(one))) for one in (ids if isinstance(ids, list) else [ids])]
    except (OSError, ValueError, TypeError, AttributeError):  # it says nothing, or nothing readable
        return []


def first_difference(tokenizer: PreTrainedTokenizerFast) -> str:
    """How the first answer is worded at the end of a conversation and before another round; empty if alike."""
    for form in FORMS:
        with contextlib.suppress(Exception):  # a template may raise anything
            alone, followed = (rendered_as(tokenizer, TURNS[:count], form) for count in (2, 4))
            question, answer = TURNS[0].text, TURNS[1].text
            found = [text.split(question, 1)[1].split(answer, 1)[0] for text in (alone, followed)]
            if found[0] != found[1]:
                return f" (before the first answer it writes {found[0]!r} if that is the last, else {found[1]!r})"
    return ""


def stripped_roles(template: Template, tokenizer: PreTrainedTokenizerFast, form: Form) -> tuple[str, ...]:
    """The roles whose texts lose the white space around them in a chat template that renders like `template`."""
    turns = [Turn(turn.role, f"\n {turn.text} \n") for turn in TURNS[:3]]
    system = [Turn("system", "\n The system \n")] if template.system_turn is not None else []
    try:
        rendered = rendered_as(tokenizer, [*system, *turns], form, answer=True)
    except Exception:  # a template may raise anything
        return ()
    for roles in _STRIPPED:
        if rendered == _text(replace(template, strips=roles), [*system, *turns]):
            return roles
    _LOG.warning(
        "%s: its chat template changes the white space around texts in a way that is not reproduced here: strip the "
        "texts in your data",
        tokenizer.name_or_path,
    )
    return ()


def find_image_prefix(template: Template, tokenizer: PreTrainedTokenizerFast, image: str) -> tuple[Segment, ...] | None:
    """What precedes a text that begins with an image, in place of `user_prefix`; None if nothing fits."""
    turns, system = _WITH_IMAGES[0], "".join(part.text for part in template.system)
    tail = _text(replace(template, system=(), user_prefix=()), turns).replace(IMAGE_PLACEHOLDER, image)
    for form in (parts_of_text, _parts_without_newlines):
        with contextlib.suppress(Exception):  # a text-only template may do anything with parts
            rendered = rendered_as(tokenizer, turns, form, answer=True)
            if rendered.startswith(system) and rendered.endswith(tail):
                return segments_of(tokenizer, rendered[len(system) : -len(tail)])
    return None


def images_alike(template: Template, tokenizer: PreTrainedTokenizerFast, image: str) -> bool:
    """Whether both word images alike, given as parts, or within the text if the chat template takes no parts."""
    texts = [_text(template, turns).replace(IMAGE_PLACEHOLDER, image) for turns in _WITH_IMAGES]
    found: list[bool] = []
    for form in (parts_of_text, _parts_without_newlines):
        with contextlib.suppress(Exception):  # a text-only template may do anything with parts
            rendered = [rendered_as(tokenizer, turns, form, answer=True) for turns in _WITH_IMAGES]
            if all(TURNS[0].text in text and "'type'" not in text for text in rendered[:2]):
                found.append(rendered == texts)
    return any(found) or not found


def ids_alike(template: Template, tokenizer: PreTrainedTokenizerFast, image: str | None) -> bool:
    """Whether a conversation's ids are those that the tokenizer gives for its whole text."""
    marks = [] if image is None else [tokenizer.get_vocab().get(part.text) for part in segments_of(tokenizer, image)]
    shown = None not in marks and bool(marks)
    middle = len(marks) // 2
    encoder = SequenceEncoder(
        tokenizer,
        template,
        image_token_id=marks[middle] if shown else -1,
        image_tokens=1,
        max_length=sys.maxsize,
        image_frame=(marks[:middle], marks[middle + 1 :]) if shown else ((), ()),
        add_start=image is not None,
    )
    for turns in (TURNS[:2], TURNS, *((*turns, TURNS[1]) for turns in (_WITH_IMAGES if shown else ()))):
        count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        sequence = encoder.encode(Sample("probe", turns, (b"",) * count, ("png",) * count), "response")
        text = _text(template, turns).replace(IMAGE_PLACEHOLDER, image or "")
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        if sequence.input_ids_T.tolist() != [*encoder.start_ids, *whole]:
            return False
    return True


def _text(template: Template, turns: Sequence[Turn]) -> str:
    return "".join(segment.text for segment in template.render(turns))


def segments_of(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[Segment, ...]:
    """Split text into plain pieces and special tokens."""
    specials = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, specials))})", text) if specials else [text]
    return tuple(Segment(piece, special=piece in specials) for piece in pieces if piece)
