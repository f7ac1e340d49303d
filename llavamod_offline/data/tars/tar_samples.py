"""A group of a tar's members → a sample, and the format of its text (see `members.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavamod_offline.data.images import image_extension
from llavamod_offline.data.parse.members import TEXT_FORMATS, TEXT_SUFFIXES, parse_json
from llavamod_offline.data.parse.row_formats import KNOWN, check_text
from llavamod_offline.data.parse.text_encoding import decode_text
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.tars.tar_reader import TarGroup, TarMember
from llavamod_offline.errors import DataError

_IMAGE = re.compile(r"(?:(0|[1-9][0-9]{0,3})\.)?(?:jpg|jpeg|png|webp)")


@dataclass(frozen=True)
class ReadRule:
    """The prompt of captions (None: they are rejected), and which suffixes to ignore."""

    caption_prompt: str | None = None
    ignore: frozenset[str] = frozenset()

    @classmethod
    def of(cls, caption_prompt: str | None, ignore: Sequence[str]) -> ReadRule:
        """From command-line arguments: suffixes with or without a dot."""
        return cls(caption_prompt, frozenset(suffix.lstrip(".").lower() for suffix in ignore))


def read_group(
    group: TarGroup, key: str, source: str, rule: ReadRule, max_side: int | None = None
) -> tuple[Sample, str, tuple[TarMember, ...]]:
    """Build the sample of a group, with its images decoded; return it, its text format, and its members, text first.

    `key` and `source` are ignored for this project's own samples, which contain them. `max_side`: the side that images
    will be shrunk to, see `decode_image`. Errors: `RowError`.
    """
    members = {suffix: member for suffix, member in group.members.items() if suffix not in rule.ignore}
    texts: dict[str, TarMember] = {suffix: members.pop(suffix) for suffix in TEXT_SUFFIXES if suffix in members}
    ordered = _images(members)
    images = tuple(image.content for image in ordered)
    extensions = tuple(_decoded(image, group.key, max_side) for image in ordered)
    contents = {suffix: decode_text(text.content, f"{group.key}.{suffix}") for suffix, text in texts.items()}
    row, problem = _fields(contents)
    for name, form in TEXT_FORMATS.items():
        if form.suffix in texts and form.matches(row):
            own = name == "sample"
            text, key = texts[form.suffix], group.key if own else key
            try:
                sample = form.read(
                    contents[form.suffix],
                    rule.caption_prompt,
                    key=key,
                    source=source,
                    images=images,
                    extensions=extensions,
                )
            except RowError:
                raise
            except DataError as error:
                raise RowError("bad conversation", str(error).removeprefix(f"sample '{key}': ")) from error
            if own:
                _check_own(sample, row, extensions)
            check_text(sample)
            return sample, name, (text, *ordered)
    raise problem


def _fields(texts: Mapping[str, str]) -> tuple[dict[str, Any], RowError]:
    """The fields of a JSON object, and what is wrong if no format matches them."""
    if "json" not in texts:
        return {}, RowError("malformed row", "has no text: neither .json nor .txt nor .cls")
    try:
        row = parse_json(texts["json"])
    except RowError as error:
        return {}, error
    found = ", ".join(f"'{name}'" for name in list(row)[:8]) if isinstance(row, dict) else type(row).__name__
    problem = RowError("malformed row", f"its JSON has {found}: expected {KNOWN}, or a caption beside it in .txt")
    return row if isinstance(row, dict) else {}, problem


def _images(members: dict[str, TarMember]) -> tuple[TarMember, ...]:
    """The images in order. Errors: `RowError` for any other member, or if the order is ambiguous."""
    numbers: dict[int | None, TarMember] = {}
    for suffix, member in members.items():
        match = _IMAGE.fullmatch(suffix)
        if match is None:
            raise RowError("bad member", _unsupported(suffix))
        number = None if match[1] is None else int(match[1])
        if number in numbers:
            raise RowError("bad member", f"'.{numbers[number].suffix}' and '.{suffix}' are the same image: keep one")
        numbers[number] = member
    if None in numbers and len(numbers) > 1:
        raise RowError("bad member", "several images, not all numbered: name them 0.jpg, 1.jpg…")
    ordered = sorted(numbers.items(), key=lambda item: item[0] or 0)
    if None not in numbers and [number for number, _ in ordered] != list(range(len(ordered))):
        raise RowError("bad member", "its images are not numbered 0, 1, 2… without gaps")
    return tuple(member for _, member in ordered)


def _unsupported(suffix: str) -> str:
    if ("." in suffix and _IMAGE.fullmatch(suffix.rpartition(".")[2])) or suffix.endswith(
        tuple(f".{text}" for text in TEXT_SUFFIXES)
    ):
        return (
            f"its name has dots: in a tar, a key ends at the first dot, which leaves '.{suffix}': rename it, "
            "or unpack the tar and pack the folder"
        )
    return f"unsupported member '.{suffix}': skip it with --ignore {suffix}"


def _decoded(image: TarMember, key: str, max_side: int | None) -> str:
    try:
        return image_extension(image.content, name=f"{key}.{image.suffix}", max_side=max_side)
    except DataError as error:
        raise RowError("undecodable image", str(error)) from error


def _check_own(sample: Sample, row: dict[str, Any], extensions: tuple[str, ...]) -> None:
    if sample.image_extensions != extensions:
        raise RowError("bad conversation", f"its images are {', '.join(extensions)}, but its JSON names others")
    if sample.content_hash != row.get("content_hash"):
        raise RowError("bad conversation", "its content does not match the hash in its JSON")
