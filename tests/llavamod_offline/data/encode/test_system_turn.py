"""System turns with a tokenizer's own chat template: rendered as it does, or the sample refused by name."""

from __future__ import annotations

import pytest

from llavamod_offline.data.encode.chat_template import from_tokenizer
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.encode.test_chat_template import QWEN2, TURNS, rendered, tokenizer

SYSTEM = Turn("system", "Answer in French.")
SAMPLE = Sample("k", (SYSTEM, *TURNS))
_TURN = (
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% for message in messages %}" + _TURN
RAISES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + _TURN
)
DROPS = "{% for message in messages if message['role'] != 'system' %}" + _TURN
MERGES = (
    "{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] + '\n\n' %}{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'user' %}{{ ns.system }}{% set ns.system = '' %}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("chat_template", [QWEN2, NO_SYSTEM], ids=["a default text", "none by default"])
def test_worded_as_the_chat_template_does(chat_template: str) -> None:
    words = tokenizer(chat_template)
    template = from_tokenizer(words)
    for count in range(1, 5):
        turns = (SYSTEM, *TURNS[:count])
        text = "".join(segment.text for segment in template.render(turns))
        assert rendered(words, turns, answer=count % 2 == 1).removesuffix("\n") == text.removesuffix("\n")
    encoder = SequenceEncoder(words, template, image_token_id=-1, image_tokens=1, max_length=500)
    sequence = encoder.encode(SAMPLE, "response")
    ids = words(rendered(words, SAMPLE.turns, answer=False).removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert sequence.input_ids_T.tolist() == ids
    without = encoder.encode(Sample("k", TURNS), "response")
    assert sequence.target_hash == without.target_hash


@pytest.mark.parametrize("chat_template", [RAISES, DROPS, MERGES], ids=["raises", "drops", "merges"])
def test_no_system_turn(chat_template: str) -> None:
    """Other samples are encoded; one with a system turn is refused by name."""
    words = tokenizer(chat_template)
    template = from_tokenizer(words)
    encoder = SequenceEncoder(words, template, image_token_id=-1, image_tokens=1, max_length=500)
    assert len(encoder.encode(Sample("k", TURNS), "response").input_ids_T)
    with pytest.raises(DataError, match=r"sample 'k' \(response\): template 'tokenizer' has no system turn"):
        encoder.encode(SAMPLE, "response")
