"""The rendered text of conversations, and which parts of it are supervised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llavamod_offline.data.encode.template import Segment, get_template
from llavamod_offline.data.sample import Turn
from llavamod_offline.errors import ConfigError, DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TWO_TURNS = (
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A dog."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
)


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def supervised_of(segments: list[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.supervised]


def test_qwen_is_the_originals_string() -> None:
    """LLaVA-MoD's `--version qwen` (conv_phi): two separators, no line breaks, <|endoftext|> at the end."""
    segments = get_template("qwen").render(TWO_TURNS)
    assert text_of(segments) == (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A dog.<|endoftext|>USER: Sure? ASSISTANT: Yes.<|endoftext|>"
    )
    assert supervised_of(segments) == [" A dog.", "<|endoftext|>", " Yes.", "<|endoftext|>"]
    assert [segment.text for segment in segments if segment.special] == ["<|endoftext|>"] * 2


def test_qwen_prompt_ends_without_a_space() -> None:
    segments = get_template("qwen").render(TWO_TURNS[:1])
    assert text_of(segments) == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert not supervised_of(segments)


def test_chatml() -> None:
    segments = get_template("chatml").render(TWO_TURNS)
    assert text_of(segments) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert supervised_of(segments) == ["A dog.", "<|im_end|>", "Yes.", "<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen", "chatml"])
def test_a_prompt_and_its_answer_make_the_conversation(name: str) -> None:
    """What generation continues is exactly what stands before the answer in training."""
    template = get_template(name)
    whole, prompt = (text_of(template.render(turns)) for turns in (TWO_TURNS, TWO_TURNS[:3]))
    assert whole == prompt + template.answer_prefix + "Yes." + template.end


SYSTEM_TURN = Turn("system", "Answer in French.")


def test_a_system_turn_takes_the_place_of_the_templates_text() -> None:
    """Worded as the template words its own, and never supervised."""
    for name, own in (("qwen", SYSTEM), ("chatml", "You are a helpful assistant.")):
        template = get_template(name)
        segments, without = template.render((SYSTEM_TURN, *TWO_TURNS)), template.render(TWO_TURNS)
        assert text_of(segments) == text_of(without).replace(own, "Answer in French.")
        assert supervised_of(segments) == supervised_of(without)
        assert [part.text for part in segments if part.special] == [part.text for part in without if part.special]


def test_a_template_without_system_turns() -> None:
    template = replace(get_template("chatml"), system_turn=None)
    with pytest.raises(DataError, match="template 'chatml' has no system turn: remove it from the sample"):
        template.render((SYSTEM_TURN, *TWO_TURNS))
    assert template.render(TWO_TURNS) == get_template("chatml").render(TWO_TURNS)


def test_unknown_template() -> None:
    with pytest.raises(ConfigError, match="'vicuna' is unknown: choose one of qwen, chatml"):
        get_template("vicuna")
