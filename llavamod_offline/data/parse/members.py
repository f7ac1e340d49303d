"""A sample's files in a tar → the sample, in any of these formats.

    sample    {key}.json as this project writes it (see `sample.py`), and its images
    llava     {key}.json with a row's `conversations`, `messages`, `texts`, or `chosen` and `rejected` (see
              `row_formats.py`), and its images
    caption   {key}.txt, the caption of one image: the answer to a request shared by the whole set
    class     {key}.cls, likewise, if there is no caption

Packing or indexing chooses the format and decodes the images; the index then names the format. To add one, write its
functions and enter them in `TEXT_FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llavamod_offline.data.parse.row_formats import TEXT_FIELDS, responses_of_row, tar_row_to_sample
from llavamod_offline.data.parse.text_encoding import decode_text
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn, sample_from_json
from llavamod_offline.errors import DataError
from llavamod_offline.plural import counted

_ROW_FIELDS = set(TEXT_FIELDS)
_SIGNATURES = (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("webp", b"RIFF"))


@dataclass(frozen=True)
class TextFormat:
    """A format of a sample's text: the suffix of its file, and for JSON which objects are of this format.

    `read` has the parameters of `_read_caption`; `responses` finds a preference's responses in its JSON.
    """

    suffix: str
    matches: Callable[[Any], bool]
    read: Callable[..., Sample]
    responses: Callable[[Any], tuple[str, ...]] = responses_of_row


def sample_from_members(
    parser: str, key: str, text: bytes, images: tuple[bytes, ...], source: str, caption_prompt: str | None = None
) -> Sample:
    """Read a sample from the bytes of its text, in one of the formats above, and of its images in order.

    `caption_prompt`: the request that captions answer, see `caption_request`.
    Errors: `DataError` if the text is malformed or does not fit the images.
    """
    if parser not in TEXT_FORMATS:
        raise DataError(f"text format '{parser}' is unknown")
    extensions = tuple(_extension(image) for image in images)
    form = TEXT_FORMATS[parser]
    content = decode_text(text, f"{key}.{form.suffix}")
    sample = form.read(content, caption_prompt, key=key, source=source, images=images, extensions=extensions)
    return sample if sample.source == source else replace(sample, source=source)


def responses_from_text(parser: str, text: bytes) -> tuple[str, ...]:
    """The chosen and the rejected response of a preference, or its only one, from its text. Errors: as for parsing."""
    form = TEXT_FORMATS[parser]
    return form.responses(parse_json(decode_text(text, f"its {form.suffix}")))


def parse_json(text: str) -> Any:
    """Parse a sample's JSON. Errors: `RowError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("malformed row", f"its JSON cannot be read: {error}") from error


def caption_request(prompt: str) -> str:
    """The text that captions answer: the prompt, after `<image>` and a line break unless it places the image itself."""
    return prompt if IMAGE_PLACEHOLDER in prompt else f"{IMAGE_PLACEHOLDER}\n{prompt}"


def _read_own(text: str, _: str | None, *, key: str, images: tuple[bytes, ...], **__: object) -> Sample:
    return sample_from_json(key, text, images)


def _read_llava(text: str, _: str | None, **settings: Any) -> Sample:
    return tar_row_to_sample(parse_json(text), **settings)


def _read_caption(
    text: str, prompt: str | None, *, key: str, source: str, images: tuple[bytes, ...], extensions: tuple[str, ...]
) -> Sample:
    """Build a sample from a caption, stripped and with line breaks as `\\n`, and its image."""
    if prompt is None:
        raise RowError("malformed row", "a caption without a prompt: set one with --caption-prompt")
    caption = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not caption:
        raise RowError("bad conversation", "its caption is empty")
    if len(images) != 1:
        raise RowError("placeholder mismatch", f"a caption with {counted(len(images), 'image')}")
    turns = (Turn("user", caption_request(prompt)), Turn("assistant", caption))
    try:
        return Sample(key, turns, images, extensions, source=source)
    except DataError as error:
        raise RowError("bad conversation", str(error).removeprefix(f"sample '{key}': ")) from error


def _extension(image: bytes) -> str:
    return next((extension for extension, signature in _SIGNATURES if image.startswith(signature)), "")


# In the order in which a sample's files are tried.
TEXT_FORMATS: dict[str, TextFormat] = {
    "sample": TextFormat(
        "json",
        lambda row: {"turns", "format"} <= row.keys(),
        _read_own,
        lambda row: tuple(str(row[role]) for role in ("chosen", "rejected") if role in row),
    ),
    "llava": TextFormat("json", lambda row: bool(_ROW_FIELDS & row.keys()), _read_llava),
    "caption": TextFormat("txt", lambda _: True, _read_caption),
    "class": TextFormat("cls", lambda _: True, _read_caption),
}
TEXT_SUFFIXES = ("json", "txt", "cls")
