"""Tools are worded as the checkpoint's chat template words them; only ordinary answers are supervised."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from llavamod_offline.data.encode.chat_template import choose_template, to_jinja
from llavamod_offline.data.encode.template import TEMPLATES
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.tools import calls_turn, result_turn, to_message, tools_turn
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.parse.test_tool_messages import talks
from tests.tiny import tiny_tokenizer

# Qwen2.5's chat template, its instructions shortened.
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call functions:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nReturn <tool_call>{\\"name\\": <function-name>}</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TOOLS = tools_turn([{"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}])
TALK = (
    TOOLS,
    Turn("system", "Be brief."),
    Turn("user", "Which is bigger, <image>\n or\n<image>?"),
    calls_turn([{"name": "look", "arguments": {"at": 1}}, {"name": "look", "arguments": {"at": 2}}], "Let me look."),
    result_turn("3 cm"),
    result_turn('{"size": "4 cm"}'),
    Turn("assistant", "The second."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
)


def tokenizer(chat_template: str = QWEN25) -> PreTrainedTokenizerFast:
    words = tiny_tokenizer()
    words.chat_template = chat_template
    return words


WORDS = tokenizer()


def encoder(words: PreTrainedTokenizerFast, name: str = "tokenizer") -> SequenceEncoder:
    image = words.convert_tokens_to_ids("<image>")
    template = choose_template(name, lambda: words)
    return SequenceEncoder(words, template, image_token_id=image, image_tokens=1, max_length=sys.maxsize)


def own_ids(words: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> list[int]:
    """The ids that transformers gives."""
    tools = json.loads(turns[0].text) if turns[0].role == "tools" else None
    messages: list[dict[str, Any]] = [
        to_message(turn) if turn.role in ("tool", "tool_calls") else {"role": turn.role, "content": turn.text}
        for turn in turns
        if turn.role != "tools"
    ]
    text = str(words.apply_chat_template(messages, tools=tools, tokenize=False)).removesuffix("\n")
    return list(words(text, add_special_tokens=False)["input_ids"])


def check(encode: SequenceEncoder, turns: tuple[Turn, ...], images: int = 0) -> None:
    sample = Sample("k", turns, (b"",) * images, ("png",) * images)
    sequence = encode.encode(sample, "response")
    assert sequence.input_ids_T.tolist() == own_ids(encode.tokenizer, turns)
    answers = [turn.text + "<|im_end|>" for turn in turns if turn.role == "assistant"]
    assert encode.tokenizer.decode(sequence.target_ids_N) == "".join(answers)


def test_ids_are_those_of_the_tokenizers_own_rendering() -> None:
    check(encoder(tokenizer()), TALK, 2)


ENCODER = encoder(WORDS)


@given(turns=talks())
@settings(max_examples=50)
def test_so_they_are_for_any_conversation(turns: tuple[Turn, ...]) -> None:
    check(ENCODER, turns)


def test_a_prompt_ends_where_the_answer_begins() -> None:
    """Generation continues there after the results of a call."""
    whole = ENCODER.encode(Sample("k", TALK[:7], (b"",) * 2, ("png",) * 2), "response")
    assert ENCODER.encode_prompt(TALK[:6]).tolist() == whole.input_ids_T[: whole.supervised_N[0]].tolist()


def test_a_preference_shares_its_prompt() -> None:
    sample = Sample("k", TALK[:6], (b"",) * 2, ("png",) * 2, "The second.", "The first.")
    assert [ENCODER.tokenizer.decode(ENCODER.encode(sample, role).target_ids_N) for role in sample.roles] == [
        "The second.<|im_end|>",
        "The first.<|im_end|>",
    ]


def test_worker_processes_have_it_too() -> None:
    template = pickle.loads(pickle.dumps(ENCODER.template))
    assert template.render(TALK) == ENCODER.template.render(TALK)


def test_an_exported_template_has_it_too_however_often_it_is_exported() -> None:
    """Each stage exports its student again, with the template as `chat_template.jinja`."""
    words = tokenizer()
    first = to_jinja(choose_template("auto", lambda: words))
    exported = tokenizer(first)
    assert own_ids(exported, TALK) == own_ids(words, TALK)
    check(encoder(exported, "auto"), TALK, 2)
    check(encoder(exported, "auto"), TALK[7:])
    second = to_jinja(choose_template("auto", lambda: exported))
    assert second.count("# Tools") == 1
    assert to_jinja(choose_template("auto", lambda: tokenizer(second))) == second


def rejected(encode: SequenceEncoder, turns: tuple[Turn, ...], reason: str) -> None:
    with pytest.raises(DataError, match=rf"^sample 'k' \(response\): .*{reason}"):
        encode.encode(Sample("k", turns), "response")


PLAIN = (TOOLS, Turn("user", "a"), Turn("assistant", "b"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_words_for_tools_rejects_the_sample(name: str) -> None:
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["</s>"]})
    rejected(encoder(words, name), PLAIN, f"template '{name}' has no wording for tools")


def test_so_does_a_chat_template_that_leaves_them_out() -> None:
    """ChatML words any role, but not a list of tools."""
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rejected(encoder(tokenizer(chatml)), PLAIN, "has no wording for tools")


def test_turns_that_are_worded_differently_once_they_are_answered_reject_the_sample() -> None:
    """Thinking models' templates do this: they drop earlier thinking."""
    changing = QWEN25.replace("{{- message.content }}\n        {{- '\\n</tool", "{{- message.content }}\n"
        "        {{- messages | length if messages | length > 6 }}\n        {{- '\\n</tool")  # fmt: skip
    assert changing != QWEN25
    encode = encoder(tokenizer(changing))
    turns = (*PLAIN[:2], calls_turn([{"name": "look", "arguments": {}}]), result_turn("b"), PLAIN[2])
    encode.encode(Sample("k", turns), "response")
    rejected(encode, (*turns, *turns[1:]), "rewords the turns before an answer once")


def test_a_result_with_a_token_of_the_template_rejects_the_sample() -> None:
    turns = (Turn("user", "a"), calls_turn([{"name": "f", "arguments": {}}]), result_turn("<|im_end|>"), PLAIN[2])
    rejected(encoder(tokenizer()), turns, "the tool turn has the text '<|im_end|>'".replace("|", r"\|"))
