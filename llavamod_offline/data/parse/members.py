"""A sample's files in a tar → the sample, whoever wrote the tar.

    sample    {key}.json as this project writes it (see `sample.py`), and its images
    llava     {key}.json with `conversations`, or with `chosen` and `rejected` (see `row_formats.py`), and its images
    caption   {key}.txt, the caption of one image: the answer to a request that is the same for the whole set

Which of them a sample is was settled when its tar was packed or indexed; its images were decoded then.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

from llavamod_offline.data.parse.row_formats import responses_of_row, tar_row_to_sample
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn, sample_from_json
from llavamod_offline.errors import DataError

Parser = Literal["sample", "llava", "caption"]

_SIGNATURES = (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("webp", b"RIFF"))


def sample_from_members(
    parser: str, key: str, text: bytes, images: tuple[bytes, ...], source: str, caption_prompt: str | None = None
) -> Sample:
    """Read a sample: its text's bytes by one of the parsers above, and the bytes of its images in their order.

    `caption_prompt`: the request that captions answer, see `caption_request`.
    Errors: `DataError` that says what is wrong with the text, or that it does not fit the images.
    """
    if parser == "sample":
        sample = sample_from_json(key, text, images)
        return sample if sample.source == source else replace(sample, source=source)
    extensions = tuple(_extension(image) for image in images)
    if parser == "llava":
        return tar_row_to_sample(_json(text), key=key, source=source, images=images, extensions=extensions)
    if parser == "caption" and caption_prompt is not None:
        return caption_to_sample(text, caption_prompt, key=key, source=source, images=images, extensions=extensions)
    raise DataError(f"nothing reads text as '{parser}'")


def responses_from_text(parser: str, text: bytes) -> tuple[str, str]:
    """The chosen and the rejected response of a preference, from its text alone. Errors: as it is parsed."""
    fields = _json(text)
    if parser == "llava":
        return responses_of_row(fields)
    return str(fields["chosen"]), str(fields["rejected"])


def caption_to_sample(
    text: bytes, prompt: str, *, key: str, source: str, images: tuple[bytes, ...], extensions: tuple[str, ...]
) -> Sample:
    """Build a sample from a caption, white space around it removed, and its image. Errors: `RowError`."""
    try:
        caption = text.decode().strip()
    except UnicodeDecodeError as error:
        raise RowError("malformed row", f"its caption is not UTF-8: {error.reason}") from error
    if len(images) != 1:
        raise RowError("placeholder mismatch", f"a caption with {len(images)} images")
    turns = (Turn("user", caption_request(prompt)), Turn("assistant", caption))
    try:
        return Sample(key, turns, images, extensions, source=source)
    except DataError as error:
        raise RowError("bad conversation", str(error).removeprefix(f"sample '{key}': ")) from error


def caption_request(prompt: str) -> str:
    """The text that captions answer: `<image>`, a line break and the prompt, unless the prompt says where it stands."""
    return prompt if IMAGE_PLACEHOLDER in prompt else f"{IMAGE_PLACEHOLDER}\n{prompt}"


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError("malformed row", f"its JSON cannot be read: {error}") from error


def _extension(image: bytes) -> str:
    return next((extension for extension, signature in _SIGNATURES if image.startswith(signature)), "")
