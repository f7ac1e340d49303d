"""Images whose ids are framed by special tokens, or by plain text that merges with its neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import ImageTokens, SequenceEncoder
from llavamod_offline.data.sample import Sample, Turn
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("template", ["qwen", "chatml"])
def test_plain_text_around_an_image_is_tokenized_with_its_neighbours(template: str) -> None:
    """As in processors that write an image as plain text around framing tokens and tokenize everything at once."""
    tokenizer = tiny_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoder = SequenceEncoder(tokenizer, get_template(template), image_token_id=image, image_tokens=1, max_length=999)
    turns = (Turn("user", "What? <image>\nIs there <image> a star"), Turn("assistant", "A star."))
    sample = Sample("k", turns, (b"", b""), ("png", "png"))
    written = [
        ImageTokens(np.array([image] * 2, np.int64), before="\n\n", after="\n"),
        ImageTokens(np.array([image], np.int64), before=" two", after=" three"),
    ]
    found = encoder.encode(sample, "response", written)
    whole = "".join(segment.text for segment in get_template(template).render(turns))
    head, middle, tail = whole.split("<image>")
    text = f"{head}\n\n<image><image>\n{middle} two<image> three{tail}"
    assert found.input_ids_T.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.encode(sample, "response").input_ids_T.tolist() == tokenizer(whole)["input_ids"]
