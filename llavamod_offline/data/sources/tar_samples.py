"""A group of a foreign tar's members → a sample, and which parser reads it again (see `members.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llavamod_offline.data.images import image_extension
from llavamod_offline.data.parse.members import Parser, caption_to_sample
from llavamod_offline.data.parse.row_formats import tar_row_to_sample
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import Sample, sample_from_json
from llavamod_offline.data.sources.tar_reader import TarGroup, TarMember
from llavamod_offline.errors import DataError

_IMAGE = re.compile(r"(?:(0|[1-9][0-9]{0,3})\.)?(?:jpg|jpeg|png|webp)")
_ROW_FIELDS = {"conversations", "chosen", "rejected"}


@dataclass(frozen=True)
class ReadRule:
    """What captions answer (None: they are no samples), and which suffixes are passed over."""

    caption_prompt: str | None = None
    ignore: frozenset[str] = frozenset()

    @classmethod
    def of(cls, caption_prompt: str | None, ignore: Sequence[str]) -> ReadRule:
        """As it is typed: suffixes with or without a dot."""
        return cls(caption_prompt, frozenset(suffix.lstrip(".").lower() for suffix in ignore))


def read_group(group: TarGroup, key: str, source: str, rule: ReadRule) -> tuple[Sample, Parser, tuple[TarMember, ...]]:
    """Build the sample of a group, its images decoded; say what parses it, and its members, the text first.

    `key` and `source` are for samples that are not this project's own, which bring theirs. Errors: `RowError`.
    """
    members = {suffix: member for suffix, member in group.members.items() if suffix not in rule.ignore}
    texts = {suffix: members.pop(suffix) for suffix in ("json", "txt") if suffix in members}
    pictures = _pictures(members)
    images = tuple(picture.content for picture in pictures)
    extensions = tuple(_decoded(picture, group.key) for picture in pictures)
    row = _json(texts["json"].content) if "json" in texts else None
    if isinstance(row, dict) and "turns" in row and "format" in row:
        sample = _own(group.key, texts["json"].content, row, images, extensions)
        return sample, "sample", (texts["json"], *pictures)
    if isinstance(row, dict) and _ROW_FIELDS & row.keys():
        sample = tar_row_to_sample(row, key=key, source=source, images=images, extensions=extensions)
        return sample, "llava", (texts["json"], *pictures)
    if "txt" in texts:
        if rule.caption_prompt is None:
            raise RowError("malformed row", "a caption: say with --caption-prompt what it is the answer to")
        text, prompt = texts["txt"], rule.caption_prompt
        sample = caption_to_sample(text.content, prompt, key=key, source=source, images=images, extensions=extensions)
        return sample, "caption", (text, *pictures)
    if "json" not in texts:
        raise RowError("malformed row", "has no text: neither .json nor .txt")
    if isinstance(row, RowError):
        raise row
    raise RowError("malformed row", "its JSON has no 'conversations', and no 'chosen' and 'rejected'")


def _pictures(members: dict[str, TarMember]) -> tuple[TarMember, ...]:
    """The images in their order. Errors: `RowError` if there is something else, or no one order."""
    numbers: dict[int | None, TarMember] = {}
    for suffix, member in members.items():
        match = _IMAGE.fullmatch(suffix)
        if match is None:
            raise RowError(
                "bad member", f"a member '.{suffix}', which is not read: pass it over with --ignore {suffix}"
            )
        number = None if match[1] is None else int(match[1])
        if number in numbers:
            raise RowError("bad member", f"'.{numbers[number].suffix}' and '.{suffix}': which image is meant?")
        numbers[number] = member
    if None in numbers and len(numbers) > 1:
        raise RowError("bad member", "several images, of which not all are numbered: call them 0.jpg, 1.jpg…")
    ordered = sorted(numbers.items(), key=lambda item: item[0] or 0)
    if None not in numbers and [number for number, _ in ordered] != list(range(len(ordered))):
        raise RowError("bad member", "its images are not numbered from 0 on without a gap")
    return tuple(member for _, member in ordered)


def _decoded(picture: TarMember, key: str) -> str:
    try:
        return image_extension(picture.content, name=f"{key}.{picture.suffix}")
    except DataError as error:
        raise RowError("undecodable image", str(error)) from error


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return RowError("malformed row", f"its JSON cannot be read: {error}")


def _own(
    key: str, content: bytes, row: dict[str, Any], images: tuple[bytes, ...], extensions: tuple[str, ...]
) -> Sample:
    try:
        sample = sample_from_json(key, content, images)
    except DataError as error:
        raise RowError("bad conversation", str(error).removeprefix(f"sample '{key}': ")) from error
    if sample.image_extensions != extensions:
        raise RowError("bad conversation", f"its images are {', '.join(extensions)}, its JSON says otherwise")
    if sample.content_hash != row.get("content_hash"):
        raise RowError("bad conversation", "its content is not what its JSON has the hash of")
    return sample
