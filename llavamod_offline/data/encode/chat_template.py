"""Convert a `Template` to a tokenizer's Jinja chat template, and back.

A chat template is a program that may do anything; a `Template` words a turn the same way wherever it occurs.
`from_tokenizer` checks this by rendering conversations of marked turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llavamod_offline.data.encode.system_turn import find_system_turn
from llavamod_offline.data.encode.template import OWN, Segment, Template, get_template
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Turn
from llavamod_offline.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE_NAME = "chat_template.jinja"
_UNKNOWN_ROLE = json.dumps("This model was trained only on messages from user and assistant, not from: ")
_UNKNOWN_PART = json.dumps("This model was trained only on text and image parts, not on: ")
_TURNS = tuple(Turn("assistant" if number % 2 else "user", f"[turn {number}]") for number in range(6))


def choose_template(name: str, tokenizer: Callable[[], PreTrainedTokenizerFast]) -> Template:
    """Look up a template by name; "tokenizer" means the tokenizer's own. Errors: `ConfigError`."""
    return from_tokenizer(tokenizer()) if name == OWN else get_template(name)


def to_jinja(template: Template) -> str:
    """A template as Jinja for transformers' `apply_chat_template`.

    A message's content is a string, or a list of parts, where each image becomes a placeholder on its own line. Roles
    and parts that no training sample has, such as a system message, raise an exception. A user turn's text ends where
    the answer begins, so `add_generation_prompt` has no effect.
    """
    question = (
        _literal([*template.user_prefix]) + " + words(message.content) + " + _literal([*template.assistant_prefix])
    )
    answer = (
        f"{_literal([Segment(template.answer_prefix)])} + words(message.content) + {_literal([Segment(template.end)])}"
    )
    return (
        "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
        f"{{%- if part.type == 'image' -%}}{{{{ {json.dumps(IMAGE_PLACEHOLDER + chr(10))} }}}}"
        "{%- elif part.type == 'text' -%}{{ part.text }}"
        f"{{%- else -%}}{{{{ raise_exception({_UNKNOWN_PART} + part.type) }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        f"{{{{ {_literal([*template.system])} }}}}{{%- for message in messages -%}}"
        f"{{%- if message.role == 'user' -%}}{{{{ {question} }}}}"
        f"{{%- elif message.role == 'assistant' -%}}"
        f"{{{{ {answer} + ('' if loop.last else {json.dumps(template.separator)}) }}}}"
        f"{{%- else -%}}{{{{ raise_exception({_UNKNOWN_ROLE} + message.role) }}}}"
        "{%- endif -%}{%- endfor -%}"
    )


def from_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Template:
    """Convert a tokenizer's chat template; without a system turn if it has none, or merges it with the user's.

    Whatever follows the last answer's end token counts as the separator of rounds. Errors: `ConfigError` if there is no
    chat template, or one that a `Template` cannot express: answers that do not end with one special token, or turns
    whose wording depends on their neighbours, as with "thinking" models.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"template '{OWN}': {_folder(tokenizer)} has no chat template: choose one by name")
    try:
        template = _split(tokenizer)
        faithful = template is not None and _renders_alike(template, tokenizer)
    except Exception as error:  # a template may raise anything
        reason = f"the chat template of {_folder(tokenizer)} fails: {first_line(error)}"
        raise ConfigError(f"template '{OWN}': {reason}: choose one by name") from error
    if template is None or not faithful:
        raise ConfigError(
            f"template '{OWN}': the chat template of {_folder(tokenizer)} words a turn differently by position, or its "
            "answers do not end with one special token: choose one by name"
        )
    return replace(template, system_turn=find_system_turn(tokenizer, template, partial(_segments, tokenizer)))


def _split(tokenizer: PreTrainedTokenizerFast) -> Template | None:
    """The template's parts, from the text between the marked turns; None if they do not fit together."""
    user, assistant, again, later = (turn.text for turn in _TURNS[:4])
    whole = _rendered(tokenizer, _TURNS[:4])
    found = re.fullmatch("(.*)".join(["", *map(re.escape, (user, assistant, again, later)), ""]), whole, re.DOTALL)
    prompt = _rendered(tokenizer, _TURNS[:1], answer=True)
    if found is None or user not in prompt:
        return None
    before, asked, between, _, after = found.groups()
    assistant_prefix = prompt.split(user, 1)[1]
    specials = [token for token in tokenizer.get_added_vocab() if between.startswith(token) and after.startswith(token)]
    if not specials or not asked.startswith(assistant_prefix):
        return None
    end = max(specials, key=len)
    separator, following = after[len(end) :], between[len(end) :]
    user_prefix = following.removeprefix(separator)
    if not following.startswith(separator) or not before.endswith(user_prefix):
        return None
    parts = [
        _segments(tokenizer, text) for text in (before[: len(before) - len(user_prefix)], user_prefix, assistant_prefix)
    ]
    plain = asked[len(assistant_prefix) :], separator
    if any(segment.special for text in plain for segment in _segments(tokenizer, text)):
        return None
    return Template(OWN, parts[0], parts[1], parts[2], answer_prefix=plain[0], end=end, separator=separator)


def _renders_alike(template: Template, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether both render prompts and conversations of every length alike."""
    for count in range(1, len(_TURNS) + 1):
        prompt = count % 2 == 1
        rendered = _rendered(tokenizer, _TURNS[:count], answer=prompt)
        if rendered != _text(template, _TURNS[:count]) + ("" if prompt else template.separator):
            return False
    return True


def _rendered(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], *, answer: bool = False) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))


def _text(template: Template, turns: Sequence[Turn]) -> str:
    return "".join(segment.text for segment in template.render(turns))


def _segments(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[Segment, ...]:
    """Split text into plain pieces and special tokens."""
    specials = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, specials))})", text) if specials else [text]
    return tuple(Segment(piece, special=piece in specials) for piece in pieces if piece)


def _literal(segments: Sequence[Segment]) -> str:
    return json.dumps("".join(segment.text for segment in segments), ensure_ascii=False)


def _folder(tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.name_or_path) or "the tokenizer"
