"""Chat templates of "thinking" models: followed if a turn is worded the same at every position, else refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ConfigError
from llavamod_offline.families import open_family
from tests.tiny import tiny_image
from tests.tiny_families import TINY_FAMILIES

_PARTS = (
    "{%- if msg.content is string -%}{{ msg.content }}{%- else -%}{%- for item in msg.content -%}"
    "{%- if item.type == 'image' -%}<|begin_of_image|><|image|><|end_of_image|>"
    "{%- elif item.type == 'text' -%}{{ item.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
)
# GLM-4.1V's, whose answers end with the token that begins the user's turn.
GLM_4_1 = (
    "[gMASK]<sop>\n{%- for msg in messages -%}"
    "{%- if msg.role == 'system' %}\n<|system|>\n{{ msg.content }}"
    "{%- elif msg.role == 'user' -%}<|user|>{{ '\n' }}" + _PARTS + "{%- elif msg.role == 'assistant' -%}"
    "<|assistant|>{{ '\n' }}{{ msg.content if msg.content is string else msg.content[0].text }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{{ '\n' }}{%- endif -%}"
)
# GLM-4.5V's and 4.6V's, which have a switch.
GLM_4_5 = (
    "[gMASK]<sop>\n{%- for msg in messages -%}"
    "{%- if msg.role == 'user' -%}<|user|>{{ '\n' }}"
    + _PARTS
    + "{{- '/nothink' if enable_thinking is defined and not enable_thinking else '' -}}"
    "{%- elif msg.role == 'assistant' -%}<|assistant|>{{ '\n<think></think>\n' }}"
    "{{- (msg.content if msg.content is string else msg.content[0].text).strip() -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>"
    "{{- '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' -}}{%- endif -%}"
)
# Qwen3's and Qwen3.5's, which word the last answer differently from those before it.
QWEN3 = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ message.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
TURNS = (
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A red star."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
)


def write(folder: Path, chat_template: str, name: str = "glm4v") -> Path:
    more = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<think>", "</think>")
    tiny = TINY_FAMILIES[name]
    tiny = dataclasses.replace(tiny, chat_template=chat_template, tokens=(*tiny.tokens, *more))
    tiny.write(folder, spare_rows=4)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ends = [ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.mark.parametrize(
    ("chat_template", "settings"), [(GLM_4_1, {}), (GLM_4_5, {"enable_thinking": False})], ids=["4.1", "4.5"]
)
def test_glms_answers_end_where_the_user_begins(tmp_path: Path, chat_template: str, settings: dict[str, Any]) -> None:
    folder = write(tmp_path / "teacher", chat_template)
    family = open_family(folder, "auto", image_aspect="auto", max_length=512)
    for count in (2, 4):
        sample = Sample("k", TURNS[:count], (tiny_image(1, (32, 32)),), ("png",))
        sequence = family.encode(sample, "response")
        tokenizer = family.encoder.tokenizer
        messages = [
            {"role": turn.role, "content": turn.text.replace("<image>", "<|begin_of_image|><|image|><|end_of_image|>")}
            for turn in sample.turns
        ]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **settings)) + "<|user|>"
        found = tokenizer.decode(sequence.input_ids_T)
        assert found.replace("<|image|>" * found.count("<|image|>"), "<|image|>") == text
        answers = tokenizer.decode(sequence.input_ids_T[sequence.supervised_N])
        assert answers.replace("\n", "") == "".join(f"{turn.text}<|user|>" for turn in TURNS[1:count:2])


def test_a_template_that_words_the_last_answer_differently_says_how(tmp_path: Path) -> None:
    folder = write(tmp_path / "teacher", QWEN3, "qwen3_vl")
    with pytest.raises(ConfigError, match=r"if that is the last, else .*: set template to qwen, chatml") as caught:
        open_family(folder, "auto", image_aspect="auto", max_length=512)
    assert "\n" not in str(caught.value)
