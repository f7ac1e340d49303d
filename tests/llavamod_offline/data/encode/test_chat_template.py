"""A tokenizer's chat template read as one of our templates, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llavamod_offline.data.encode.chat_template import choose_template, from_tokenizer, to_jinja
from llavamod_offline.data.encode.template import Template, get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ConfigError
from tests.tiny import tiny_tokenizer

TURNS = (Turn("user", "What is it?"), Turn("assistant", "A dog."), Turn("user", "Sure?"), Turn("assistant", "Yes."))
# The chat template of Qwen2's instruction-tuned models: https://huggingface.co/Qwen/Qwen2-1.5B-Instruct
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = chat_template
    return made


def rendered(words: PreTrainedTokenizerFast, turns: Sequence[Turn], *, answer: bool) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return str(words.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))


def test_qwen2s_own_is_chatml() -> None:
    assert from_tokenizer(tokenizer(QWEN2)) == dataclasses.replace(get_template("chatml"), name="tokenizer")


@pytest.mark.parametrize("name", ["qwen", "chatml"])
def test_there_and_back(name: str) -> None:
    template = get_template(name)
    words = tokenizer(to_jinja(template))
    for count in range(1, 5):
        text = "".join(segment.text for segment in template.render(TURNS[:count]))
        assert rendered(words, TURNS[:count], answer=count % 2 == 1) == text
    back = choose_template("tokenizer", lambda: words)
    if name == "qwen":
        assert back == dataclasses.replace(template, name="tokenizer")
    else:  # its answers do not end with the separator, which is then read as part of the next question
        assert [s.text for s in back.render(TURNS)] != []
        assert "".join(s.text for s in back.render(TURNS)) == "".join(s.text for s in template.render(TURNS))


@pytest.mark.parametrize("name", ["qwen", "chatml", "llava_v1"])
@pytest.mark.parametrize("parts", [False, True])
def test_an_exported_template_keeps_a_system_message(name: str, parts: bool) -> None:
    """As the first message, in place of the template's own; anywhere else it raises."""
    template = get_template(name)
    words = tiny_tokenizer()
    words.chat_template = to_jinja(template)
    for count in range(1, 5):
        turns = (Turn("system", "Answer in French."), *TURNS[:count])
        contents = [[{"type": "text", "text": turn.text}] if parts else turn.text for turn in turns]
        messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]
        text = "".join(segment.text for segment in template.render(turns))
        assert words.apply_chat_template(messages, tokenize=False) == text
    if name != "llava_v1":  # the tiny tokenizer lacks its end token
        assert from_tokenizer(words).system_turn is not None


@pytest.mark.parametrize("name", ["qwen", "chatml"])
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "system", "content": "Answer in French."}, "user and assistant, not from: system"),
        ({"role": "tool", "content": "42"}, "user and assistant, not from: tool"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "image parts, not on: image_url",
        ),
    ],
)
def test_messages_that_no_student_was_trained_on_raise(name: str, message: dict[str, Any], reason: str) -> None:
    """They are neither worded as the student's answer nor silently dropped."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = to_jinja(get_template(name))
    known = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert "<image>\nHi" in str(tokenizer.apply_chat_template(known, tokenize=False))
    with pytest.raises(Exception, match=reason):
        tokenizer.apply_chat_template([*known, message], tokenize=False)


@pytest.mark.parametrize("chat_template", [QWEN2, to_jinja(get_template("qwen")), to_jinja(get_template("chatml"))])
def test_ids_are_those_of_the_tokenizers_own_rendering(chat_template: str) -> None:
    """The template's special tokens become single ids; the supervised tokens are the answers with their end tokens."""
    words = tokenizer(chat_template)
    template = from_tokenizer(words)
    encoder = SequenceEncoder(words, template, image_token_id=399, image_tokens=9, max_length=512)
    sequence = encoder.encode(Sample("a", TURNS), "response")
    whole = words(rendered(words, TURNS, answer=False), add_special_tokens=False)["input_ids"]
    ids = sequence.input_ids_T.tolist()
    assert ids == whole[: len(ids)]
    assert words.decode(whole[len(ids) :]) == template.separator
    supervised = words.decode(sequence.input_ids_T[sequence.supervised_N])
    assert supervised == "".join(template.answer_prefix + turn.text + template.end for turn in TURNS[1::2])


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only with tools') }}", "fails: only with tools"),
        ("{{ messages[0].content }}", "words a turn differently by position"),
        # The last answer is worded differently, as in thinking models.
        (
            QWEN2.replace("message['content']", "(message['content'] + ('!' if loop.last else ''))"),
            "words a turn differently by position",
        ),
        # No special token ends an answer.
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "end with one special token"),
        # Longer conversations lose the default system turn.
        (QWEN2.replace("loop.first", "loop.first and messages|length < 5"), "words a turn differently by position"),
    ],
)
def test_what_no_template_can_say_is_refused(chat_template: str | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        from_tokenizer(tokenizer(chat_template))
    assert str(caught.value).startswith("template 'tokenizer': ")
    assert "choose one by name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_chat_template_is_worded_as_llava_mod_words_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = tokenizer(None)
    assert choose_template("auto", lambda: words) == get_template("qwen")
    assert "has no chat template" in caplog.text
    assert "set template to" in caplog.text


def test_an_unknown_name_lists_the_known_ones() -> None:
    def never() -> PreTrainedTokenizerFast:
        raise AssertionError("a named template needs no tokenizer")

    assert choose_template("qwen", never) == get_template("qwen")
    with pytest.raises(ConfigError, match="'vicuna' is unknown: choose one of qwen, chatml, llava_v1, tokenizer, auto"):
        choose_template("vicuna", never)
    assert isinstance(get_template("qwen"), Template)


# As in the processors of LLaVA-OneVision and LLaVA-1.5: content only as parts, images first.
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Content as parts, images where they stand, as in Qwen2-VL's processor.
QWEN_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}IMAGE"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Content only as parts, the newline after an image added by the template, and an end token after each answer.
PARTS_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Answers before the last one lose their thinking, as with Qwen3.
THINKING = QWEN2.replace(
    "message['content']", "(('' if not loop.last else '<think>\n\n</think>\n\n') + message['content'])"
)


@pytest.mark.parametrize(
    ("chat_template", "name", "image"),
    [
        (to_jinja(get_template("qwen")), "qwen", "<image>"),
        (to_jinja(get_template("chatml")), "chatml", "<image>"),
        (QWEN2, "chatml", "<image>"),
        (QWEN2, "chatml", None),
        (QWEN_VL.replace("IMAGE", "<image>"), "chatml", "<image>"),
        (QWEN_VL.replace("IMAGE", "<|im_end|><image><|im_end|>"), "chatml", "<|im_end|><image><|im_end|>"),
        (PARTS_ALONE, "tokenizer", "<image>"),
    ],
)
def test_what_a_checkpoint_was_trained_with_is_found(chat_template: str, name: str, image: str | None) -> None:
    """A known wording gets its usual name, so that teacher and student share a template however each spells it."""
    words = tokenizer(chat_template)
    template = choose_template("auto", lambda: words, image=image)
    assert template.name == name
    if name != "tokenizer":
        assert template == get_template(name)
    text = "".join(segment.text for segment in template.render(TURNS))
    messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in TURNS]
    if "content is string" in chat_template or name == "tokenizer":
        assert str(words.apply_chat_template(messages, tokenize=False)).removesuffix("\n") == text


@pytest.mark.parametrize(
    ("chat_template", "image", "reason"),
    [
        ("{{ raise_exception('only with tools') }}", "<image>", "fails: only with tools"),
        (THINKING, None, "words a turn differently by position"),
        (ONEVISION, "<image>", "words a turn differently by position"),
        (LLAVA_HF, "<image>", "answers do not end with one special token"),
        (QWEN2 + "{{ strftime_now('%Y') }}", None, "depends on the date"),
        # Images are not written as, or not where, the model's processor writes them.
        (QWEN_VL.replace("IMAGE", "Picture: <image>"), "<image>", "words turns with images differently"),
        # The space before an answer belongs both to its first word and to the prompt.
        (
            QWEN2.replace("assistant\n' }}", "assistant\nThe ' }}").replace(
                "'\n' + message['content']",
                "'\n' + ('The ' if message['role'] == 'assistant' else '') + message['content']",
            ),
            None,
            "joins tokens",
        ),
    ],
)
def test_what_cannot_be_followed_is_one_line_with_the_way_out(
    chat_template: str | None, image: str | None, reason: str
) -> None:
    words = tokenizer(chat_template)
    with pytest.raises(ConfigError, match=reason) as caught:
        choose_template("auto", lambda: words, image=image)
    assert str(caught.value).startswith("template 'auto': ")
    assert "choose one by name: set template to qwen, chatml, llava_v1" in str(caught.value)
    assert "\n" not in str(caught.value)


# Like Gemma's: white space around texts is dropped, also after an image.
STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like SmolVLM's: a space follows the colon unless the text begins with an image.
COLON = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% elif c.type == 'image' %}<image>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.mark.parametrize("setting", ["auto", "tokenizer"])
@pytest.mark.parametrize("chat_template", [STRIPPING, COLON], ids=["stripping", "colon"])
@pytest.mark.parametrize("export", [False, True])
def test_white_space_and_prefixes_beside_images_are_worded_as_the_chat_template_does(
    chat_template: str, setting: str, export: bool
) -> None:
    words = tokenizer(chat_template)
    template = choose_template(setting, lambda: words)
    asked = [
        ("<image>\nWhat is it?", [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]),
        ("What is it?", [{"type": "text", "text": "What is it?"}]),
        (
            "What is <image> here?",
            [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": " here?"}],
        ),
    ]
    if export:  # a student's chat template ends an image's line by itself unless it strips
        words = tokenizer(to_jinja(template))
        asked[0] = (asked[0][0], [{"type": "image"}, {"type": "text", "text": "What is it?"}])
        del asked[2]
    for text, parts in asked:
        turns = (Turn("user", text), Turn("assistant", "A dog."), Turn("user", "Sure?"))
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ]
        found = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert "".join(segment.text for segment in template.render(turns)) == found


# Like STRIPPING, but white space is dropped only around the texts of one role.
ONE_SIDED = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == '{role}' %}}{{{{ m.content | trim }}}}"
    "{{% else %}}{{{{ m.content }}}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


@pytest.mark.parametrize("role", ["user", "assistant", "system", "nobody"])
@pytest.mark.parametrize("setting", ["auto", "tokenizer"])
def test_white_space_is_dropped_for_the_roles_of_the_chat_template(setting: str, role: str) -> None:
    words = tokenizer(ONE_SIDED.format(role=role))
    template = choose_template(setting, lambda: words, image=None)
    back = tokenizer(to_jinja(template))
    turns = tuple(Turn(turn.role, f"\n {turn.text} \n") for turn in (Turn("system", "Be brief."), *TURNS[:3]))
    assert "".join(segment.text for segment in template.render(turns)) == rendered(words, turns, answer=True)
    assert rendered(back, turns, answer=True) == rendered(words, turns, answer=True)


def test_a_system_turn_is_found_where_texts_are_parts_alone() -> None:
    words = tokenizer(COLON)
    template = choose_template("tokenizer", lambda: words)
    turns = (Turn("system", "Be brief."), *TURNS[:3])
    messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in turns]
    found = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join(segment.text for segment in template.render(turns)) == found


def test_of_several_chat_templates_that_for_tools_words_them() -> None:
    tools = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' + (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    words = tokenizer(None)
    words.chat_template = {"default": ONE_SIDED.format(role="nobody"), "tool_use": tools}
    template = choose_template("auto", lambda: words, image=None)
    assert template.tool_wording is not None
    assert template.tool_wording.chat_template == tools
    assert tools in to_jinja(template)
    assert template == choose_template("auto", lambda: tokenizer(ONE_SIDED.format(role="nobody")), image=None)
