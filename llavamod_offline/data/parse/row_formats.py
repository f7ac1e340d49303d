"""Rows in the known formats → samples.

    conversation   {"id", "image": path | [path…], "conversations": [{"from": "human" | "gpt", "value"}…]}   (LLaVA)
    preference     {"id", "image": path | [path…], "chosen": [human, gpt], "rejected": [human, gpt]}      (LLaVA-MoD)
    parquet        columns image {bytes, path}, question, chosen, rejected, optional idx and ds_name        (RLAIF-V)

A missing image key, null or an empty list means text only. The prompt of a parquet row is `<image>`, a line break and
the question. A row that breaks the format is a `RowError`; nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llavamod_offline.data.images import image_extension
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Role, Sample, Turn
from llavamod_offline.errors import DataError

ReadImage = Callable[[str], bytes]

_ROLES: Mapping[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_OTHER_MEDIA = ("images", "video", "videos", "audio", "audios")


def json_row_to_sample(row: Any, *, key: str, source: str, read_image: ReadImage) -> Sample:
    """Build a sample from a LLaVA conversation or a LLaVA-MoD preference, depending on its fields."""
    parsed = _read_row(row)
    _check_placeholders(parsed.turns, len(parsed.image_names))
    images = tuple(read_image(name) for name in parsed.image_names)
    return _build(key, parsed, images, _decoded_extensions(images, parsed.image_names), source)


def tar_row_to_sample(
    row: Any, *, key: str, source: str, images: tuple[bytes, ...], extensions: tuple[str, ...]
) -> Sample:
    """Build a sample from such a row in a tar that also holds its images; the row need not name them."""
    parsed = _read_row(row)
    if parsed.image_names and len(parsed.image_names) != len(images):
        reason = f"field 'image' names {len(parsed.image_names)} image(s), the tar holds {len(images)}"
        raise RowError("placeholder mismatch", reason)
    _check_placeholders(parsed.turns, len(images))
    return _build(key, parsed, images, extensions, source)


def responses_of_row(row: Any) -> tuple[str, str]:
    """The chosen and the rejected response of a LLaVA-MoD preference."""
    parsed = _read_row(row)
    if parsed.chosen is None or parsed.rejected is None:
        raise RowError("malformed row", "has no 'chosen' and 'rejected'")
    return parsed.chosen, parsed.rejected


def parquet_row_to_sample(row: Mapping[str, Any], *, key: str, source: str) -> Sample:
    """Build a preference sample from an RLAIF-V row, which contains its image."""
    for field in ("question", "chosen", "rejected"):
        if not isinstance(row[field], str):
            raise RowError("malformed row", f"field '{field}' is {type(row[field]).__name__}, expected a string")
    image = row["image"]
    encoded = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(encoded, bytes):
        raise RowError("missing image", "field 'image' holds no bytes")
    turns = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{row['question']}"),)
    _check_placeholders(turns, 1)
    names = (str(image.get("path") or "image"),)
    parsed = _ParsedRow(turns, names, row["chosen"], row["rejected"])
    return _build(key, parsed, (encoded,), _decoded_extensions((encoded,), names), source)


@dataclass(frozen=True)
class _ParsedRow:
    """The contents of a row; the turns of a preference are its prompt."""

    turns: tuple[Turn, ...]
    image_names: tuple[str, ...]
    chosen: str | None
    rejected: str | None


def _read_row(row: Any) -> _ParsedRow:
    if not isinstance(row, dict):
        raise RowError("malformed row", f"expected an object, found {type(row).__name__}")
    other = [name for name in _OTHER_MEDIA if row.get(name)]
    if other:
        raise RowError("malformed row", f"field '{other[0]}' is not supported: name its images in 'image'")
    names = tuple(_image_names(row.get("image")))
    if ("conversations" in row) == ("chosen" in row or "rejected" in row):
        raise RowError("malformed row", "expected either 'conversations', or both 'chosen' and 'rejected'")
    if "conversations" in row:
        return _ParsedRow(_turns(row["conversations"], "conversations"), names, None, None)
    turns, chosen, rejected = _preference(row)
    return _ParsedRow(turns, names, chosen, rejected)


def _decoded_extensions(images: tuple[bytes, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(image_extension(image, name=name) for image, name in zip(images, names, strict=True))
    except DataError as error:
        raise RowError("undecodable image", str(error)) from error


def _build(key: str, parsed: _ParsedRow, images: tuple[bytes, ...], extensions: tuple[str, ...], source: str) -> Sample:
    try:
        return Sample(key, parsed.turns, images, extensions, parsed.chosen, parsed.rejected, source)
    except DataError as error:
        raise RowError("bad conversation", str(error).removeprefix(f"sample '{key}': ")) from error


def _image_names(value: Any) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowError("malformed row", "field 'image' must be a path or a list of paths")
    return names


def _turns(value: Any, field: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise RowError("malformed row", f"field '{field}' must be a list of turns, at least one")
    turns = []
    for index, turn in enumerate(value):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise RowError("malformed row", f"'{field}' turn {index}: expected an object of strings 'from' and 'value'")
        if speaker == "system":
            hint = "the template has its own system text: remove the turn"
            raise RowError("bad conversation", f"'{field}' turn {index} is by 'system': {hint}")
        if speaker not in _ROLES:
            raise RowError("bad conversation", f"'{field}' turn {index} is by '{speaker}', expected 'human' or 'gpt'")
        turns.append(Turn(_ROLES[speaker], text))
    return tuple(turns)


def _preference(row: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str, str]:
    chosen, rejected = (_turns(row.get(field), field) for field in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError("bad conversation", "'chosen' and 'rejected' answer different prompts")
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise RowError("bad conversation", "'chosen' and 'rejected' must end with an answer by 'gpt'")
    return chosen[:-1], chosen[-1].text, rejected[-1].text


def _check_placeholders(turns: tuple[Turn, ...], images: int) -> None:
    found = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if images and not found:
        hint = f"put '{IMAGE_PLACEHOLDER}' where a human turn refers to it, or remove 'image'"
        raise RowError("placeholder mismatch", f"has an image that its text does not refer to: {hint}")
    if found != images:
        reason = f"{found} '{IMAGE_PLACEHOLDER}' in the human turns for {images} image(s)"
        raise RowError("placeholder mismatch", reason)
