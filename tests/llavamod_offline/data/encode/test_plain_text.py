"""The pieces of a conversation get the ids that the tokenizer gives the whole text."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from llavamod_offline.data.encode.plain_text import PlainText
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.sample import Sample, Turn
from tests.tiny import tiny_tokenizer
from tests.tiny_llama import KINDS, llama_tokenizer

CONVERSATIONS = (
    ("What is it?", "A dog."),
    ("<image>\nWhat is in the picture?", "A red star."),
    ("<image>\n<image>\nSure?", "No."),
    ("Is <image> it or <image>?", "Yes.", "Sure?", " A  dog\n and 7 stars.", "<image>", "x"),
)


def encoder(tokenizer: PreTrainedTokenizerFast, template: str) -> SequenceEncoder:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return SequenceEncoder(tokenizer, get_template(template), image_token_id=image, image_tokens=1, max_length=999)


def sample(texts: tuple[str, ...]) -> Sample:
    turns = tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    count = sum(text.count("<image>") for text in texts)
    return Sample("a", turns, (b"",) * count, ("png",) * count)


@pytest.mark.parametrize("texts", CONVERSATIONS)
@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_a_conversation_has_the_ids_of_its_whole_text(kind: str, texts: tuple[str, ...]) -> None:
    tokenizer, template = (tiny_tokenizer(), "qwen") if kind == "bytes" else (llama_tokenizer(kind), "llava_v1")
    coder = encoder(tokenizer, template)
    sequence = coder.encode(sample(texts), "response")
    text = "".join(part.text for part in get_template(template).render(sample(texts).turns))
    assert sequence.input_ids_T.tolist() == tokenizer(text)["input_ids"]
    assert coder.start_ids == (() if kind == "bytes" else (1,))
    answers = [f" {answer}{get_template(template).end}" for answer in texts[1::2]]
    assert tokenizer.decode(sequence.target_ids_N).strip() == "".join(answers).strip()
    prompt = coder.encode_prompt(sample(texts).turns[:1])
    assert sequence.input_ids_T[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_in_a_text_stay_plain_characters(kind: str) -> None:
    tokenizer = llama_tokenizer(kind)
    ids = encoder(tokenizer, "llava_v1").encode(sample(("What is </s> it <s>?", "A </s> dog.")), "response").input_ids_T
    assert ids.tolist().count(2) == 1
    assert ids.tolist().count(1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_answers_first_word_is_one_token(kind: str) -> None:
    tokenizer = llama_tokenizer(kind)
    assert tokenizer.convert_ids_to_tokens(encoder(tokenizer, "llava_v1").answer_ids(" Yes.").tolist()) == ["▁Yes."]
    assert not PlainText(tiny_tokenizer()).depends_on_place


def test_a_template_that_begins_with_the_start_token_gets_no_second_one() -> None:
    from llavamod_offline.data.encode.chat_template import choose_template

    tokenizer = llama_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + 'USER: ' + m.content + ' ASSISTANT:' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    template = choose_template("auto", lambda: tokenizer)
    coder = SequenceEncoder(tokenizer, template, image_token_id=-1, image_tokens=0, max_length=999)
    turns = sample(("What is it?", "A dog.", "Sure?", "Yes.")).turns
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = coder.encode(Sample("a", turns), "response").input_ids_T.tolist()
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(1) == 2
