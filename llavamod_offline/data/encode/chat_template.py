"""Convert a `Template` to a tokenizer's Jinja chat template, and back.

A chat template is a program that may do anything; a `Template` words a turn the same way wherever it occurs.
`from_tokenizer` checks this by rendering conversations of marked turns. `trained_with` also checks images and ids.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llavamod_offline.data.encode.chat_probes import (
    FORMS,
    TURNS,
    Form,
    find_image_prefix,
    first_difference,
    ids_alike,
    images_alike,
    model_ends,
    own_chat_template,
    rendered_as,
    renders_alike,
    segments_of,
    stripped_roles,
)
from llavamod_offline.data.encode.system_turn import find_system_turn
from llavamod_offline.data.encode.template import AUTO, OWN, ROLES, TEMPLATES, Segment, Template, get_template
from llavamod_offline.data.encode.tool_wording import find_tool_wording
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LOG = logging.getLogger(__name__)
CHAT_TEMPLATE_NAME = "chat_template.jinja"
_UNKNOWN_ROLE = json.dumps("This model was trained only on messages from user and assistant, not from: ")
_UNKNOWN_PART = json.dumps("This model was trained only on text and image parts, not on: ")
_BEGINS_WITH_IMAGE = "message.content is not string and message.content and message.content[0].type == 'image'"
_IF_TOOLS = "{%- if tools or messages | selectattr('role', 'equalto', 'tool') | list -%}"
_WITHOUT_TOOLS = "{#- without tools -#}{%- else -%}"
_WAY_OUT = f"choose one by name: set template to {', '.join(TEMPLATES)}"


def choose_template(
    name: str, tokenizer: Callable[[], PreTrainedTokenizerFast], *, image: str | None = IMAGE_PLACEHOLDER
) -> Template:
    """Look up a template by name; "tokenizer" means the tokenizer's own, "auto" what `trained_with` finds.

    Errors: `ConfigError`.
    """
    if name not in (AUTO, OWN):
        return get_template(name)
    read, own = trained_with if name == AUTO else from_tokenizer, tokenizer()
    try:
        return read(own, image=image)
    except ConfigError:
        without = _without_thinking(own)
        if without is None:
            raise
        try:
            template = read(without, image=image)
        except ConfigError:
            template = None
        if template is None:
            raise
        _LOG.info("template '%s': that of %s with enable_thinking=false", name, _folder(own))
        return template


def trained_with(tokenizer: PreTrainedTokenizerFast, *, image: str | None = IMAGE_PLACEHOLDER) -> Template:
    """The wording that a checkpoint was trained with, according to its chat template.

    A known template, such as LLaVA-MoD's in its students, is returned under its own name, any other as "tokenizer".
    `image`: how the model's processor writes an image in text; None for a model without images. Prompts with zero, one
    and two images, several rounds, and the ids of all these are compared with the chat template and the tokenizer.
    Without a chat template the result is LLaVA-MoD's, with a warning. Errors: `ConfigError` if no `Template` can
    express the chat template.
    """
    folder = _folder(tokenizer)
    if not tokenizer.chat_template:
        _LOG.warning(
            "template 'auto': %s has no chat template, so its turns are worded as LLaVA-MoD words them (qwen); if it "
            "was trained otherwise, set template to %s",
            folder,
            " or ".join(name for name in TEMPLATES if name != "qwen"),
        )
        return get_template("qwen")
    if "strftime_now" in own_chat_template(tokenizer):
        raise ConfigError(f"template 'auto': the chat template of {folder} depends on the date: {_WAY_OUT}")
    template = _known(tokenizer)
    if template is None:
        template = from_tokenizer(tokenizer, setting=AUTO, image=image)
    if image is not None and not images_alike(template, tokenizer, image):
        raise ConfigError(
            f"template 'auto': the chat template of {folder} words turns with images differently: {_WAY_OUT}"
        )
    if not ids_alike(template, tokenizer, image):
        raise ConfigError(
            f"template 'auto': the tokenizer of {folder} joins tokens across the turns of its chat template: "
            f"{_WAY_OUT}, or to {OWN} to tokenize them one by one"
        )
    return _with_tools(tokenizer, template)


def _known(tokenizer: PreTrainedTokenizerFast) -> Template | None:
    """The known template that words conversations as a tokenizer's chat template does, with its use of white space."""
    for known in TEMPLATES.values():
        if form := _form_of(tokenizer, known):
            return replace(known, strips=stripped_roles(known, tokenizer, form))
    return None


def words_as(tokenizer: PreTrainedTokenizerFast, template: Template) -> bool:
    """Whether a tokenizer has a chat template that words conversations as `template` does."""
    return bool(tokenizer.chat_template) and _form_of(tokenizer, template) is not None


def _form_of(tokenizer: PreTrainedTokenizerFast, template: Template) -> Form | None:
    """The form of texts with which a chat template words conversations as `template` does; None if there is none."""
    return next((form for form in FORMS if _succeeds(partial(renders_alike, template, tokenizer, form))), None)


def to_jinja(template: Template, *, image: str = IMAGE_PLACEHOLDER) -> str:
    """A template as Jinja for transformers' `apply_chat_template`.

    A message's content is a string, or a list of parts, where each image becomes `image` on its own line. A first
    system message replaces the template's own system text, as in training. Roles and parts that no training sample has
    raise an exception. A user turn's text ends where the answer begins, so `add_generation_prompt` has no effect.
    Conversations with tools are left to the chat template that words them.
    """
    if template.tool_wording is not None:
        own = template.tool_wording.chat_template.removeprefix(_IF_TOOLS).partition(_WITHOUT_TOOLS)[0]
        plain = to_jinja(replace(template, tool_wording=None))
        return f"{_IF_TOOLS}{own}{_WITHOUT_TOOLS}{plain}{{%- endif -%}}"
    system, skip = f"{{{{ {_literal(template.system)} }}}}", ""
    if template.system_turn is not None:
        before, after = map(_literal, template.system_turn)
        given = f"{{{{ {before} + words(messages[0].content, 'system') + {after} }}}}"
        system = f"{{%- if messages and messages[0].role == 'system' -%}}{given}{{%- else -%}}{system}{{%- endif -%}}"
        skip = "{%- elif message.role == 'system' and loop.first -%}"
    prefix = _literal(template.user_prefix)
    if template.image_prefix is not None:
        prefix = f"({_literal(template.image_prefix)} if {_BEGINS_WITH_IMAGE} else {prefix})"
    said = "words(message.content, message.role)"
    question = f"{prefix} + {said} + {_literal(template.assistant_prefix)}"
    answer = f"{_literal([Segment(template.answer_prefix)])} + {said} + {_literal([Segment(template.end)])}"
    content, text = (_trimmed(expression, template) for expression in ("content", "part.text"))
    line = "" if "user" in template.strips else "\n"
    return (
        f"{{%- macro words(content, role) -%}}{{%- if content is string -%}}{{{{ {content} }}}}{{%- else -%}}"
        "{%- for part in content -%}"
        f"{{%- if part.type == 'image' -%}}{{{{ {json.dumps(image + line)} }}}}"
        f"{{%- elif part.type == 'text' -%}}{{{{ {text} }}}}"
        f"{{%- else -%}}{{{{ raise_exception({_UNKNOWN_PART} + part.type) }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        f"{system}{{%- for message in messages -%}}"
        f"{{%- if message.role == 'user' -%}}{{{{ {question} }}}}"
        f"{{%- elif message.role == 'assistant' -%}}"
        f"{{{{ {answer} + ('' if loop.last else {json.dumps(template.separator)}) }}}}{skip}"
        f"{{%- else -%}}{{{{ raise_exception({_UNKNOWN_ROLE} + message.role) }}}}"
        "{%- endif -%}{%- endfor -%}"
    )


def _trimmed(expression: str, template: Template) -> str:
    """A text in Jinja without the white space that the template drops for its role."""
    if not template.strips or set(template.strips) == set(ROLES):
        return expression + " | trim" * bool(template.strips)
    return f"({expression} | trim if role in {json.dumps(template.strips)} else {expression})"


def from_tokenizer(
    tokenizer: PreTrainedTokenizerFast, *, setting: str = OWN, image: str | None = IMAGE_PLACEHOLDER
) -> Template:
    """Convert a tokenizer's chat template; the result has no system turn if it has none or merges it with the user's.

    `image`: how the model's processor writes an image in text; None for a model without images.
    Whatever follows the last answer's end token counts as the separator of rounds. Errors: `ConfigError`, naming the
    template `setting`, if there is no chat template, or one that a `Template` cannot express: answers that do not end
    with one special token, or turns whose wording depends on their neighbours, as with "thinking" models.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"template '{setting}': {_folder(tokenizer)} has no chat template: {_WAY_OUT}")
    failures: list[Exception] = []
    for form in FORMS:
        try:
            template = _split(tokenizer, form)
            if template is not None and renders_alike(template, tokenizer, form):
                template = replace(template, strips=stripped_roles(template, tokenizer, form))
                if image is not None and not images_alike(template, tokenizer, image):
                    template = replace(template, image_prefix=find_image_prefix(template, tokenizer, image))
                system_turn = find_system_turn(tokenizer, template, partial(segments_of, tokenizer), form)
                template = replace(template, system_turn=system_turn)
                template = replace(template, strips=stripped_roles(template, tokenizer, form))
                return _with_tools(tokenizer, template)
        except Exception as error:  # a template may raise anything
            failures.append(error)
    if len(failures) == len(FORMS):
        reason = f"the chat template of {_folder(tokenizer)} fails: {first_line(failures[0])}"
        raise ConfigError(f"template '{setting}': {reason}: {_WAY_OUT}") from failures[0]
    difference = first_difference(tokenizer)
    problem = f"words a turn differently by position, or its answers do not end with one special token{difference}"
    raise ConfigError(f"template '{setting}': the chat template of {_folder(tokenizer)} {problem}: {_WAY_OUT}")


def _without_thinking(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast | None:
    """The same tokenizer with its chat template's switch set to answers without thinking; None if it has none."""
    if "enable_thinking" not in own_chat_template(tokenizer):
        return None
    other = copy.copy(tokenizer)
    other.chat_template = "{% set enable_thinking = false %}" + own_chat_template(tokenizer)
    return other


def _split(tokenizer: PreTrainedTokenizerFast, form: Form) -> Template | None:
    """The template's parts, from the text between the marked turns; None if they do not fit together."""
    user, assistant, again, later = (turn.text for turn in TURNS[:4])
    whole = rendered_as(tokenizer, TURNS[:4], form)
    found = re.fullmatch("(.*)".join(["", *map(re.escape, (user, assistant, again, later)), ""]), whole, re.DOTALL)
    prompt = rendered_as(tokenizer, TURNS[:1], form, answer=True)
    if found is None or user not in prompt:
        return None
    before, asked, between, _, after = found.groups()
    assistant_prefix = prompt.split(user, 1)[1]
    if not after.strip() and before.endswith(between):  # as in GLM's: answers end with what begins the user's turn
        after = next((token for token in model_ends(tokenizer) if between.startswith(token)), "")
    specials = [token for token in tokenizer.get_added_vocab() if between.startswith(token) and after.startswith(token)]
    if not specials or not asked.startswith(assistant_prefix):
        return None
    end = max(specials, key=len)
    separator, following = after[len(end) :], between[len(end) :]
    if not separator:  # it may occur only between rounds
        separator = next(following[:n] for n in range(len(following) + 1) if before.endswith(following[n:]))
    user_prefix = following.removeprefix(separator)
    if not following.startswith(separator) or not before.endswith(user_prefix):
        return None
    parts = [
        segments_of(tokenizer, text)
        for text in (before[: len(before) - len(user_prefix)], user_prefix, assistant_prefix)
    ]
    plain = asked[len(assistant_prefix) :], separator
    if any(segment.special for text in plain for segment in segments_of(tokenizer, text)):
        return None
    return Template(OWN, parts[0], parts[1], parts[2], answer_prefix=plain[0], end=end, separator=separator)


def _with_tools(tokenizer: PreTrainedTokenizerFast, template: Template) -> Template:
    """A template with its checkpoint's words for tools, if it has any."""
    wording = find_tool_wording(tokenizer, template)
    return template if wording is None else replace(template, tool_wording=wording)


def _succeeds(check: Callable[[], bool]) -> bool:
    """The result of a check of a template, which may raise anything."""
    try:
        return check()
    except Exception:
        return False


def _literal(segments: Sequence[Segment]) -> str:
    return json.dumps("".join(segment.text for segment in segments), ensure_ascii=False)


def _folder(tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.name_or_path) or "the tokenizer"
