"""Conversations as found in rows → turns, with their images in order.

    from/value     {"from": "human" | "gpt" | "system", "value": text}                          (LLaVA, ShareGPT)
    role/content   {"role": "user" | "assistant" | "system", "content": text or parts}        (TRL, ms-swift, OpenAI)
    pairs          {"user": text, "assistant": text}                                                (FineVision)

Parts are `{"type": "text", "text"}` and `{"type": "image"}`, which may hold its image, or `{"type": "image_url"}`.
Calls and results of tools: see `tool_messages.py`. An image becomes `<image>`, on a line of its own unless white space
separates it from its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llavamod_offline.data.parse.row_images import SOURCES, RowImage, row_images
from llavamod_offline.data.parse.tool_messages import tool_turn
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Role, Turn
from llavamod_offline.data.tools import joined_calls

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_TURN_FIELDS = "strings 'from' and 'value', or 'role' and 'content'"
_WEIGHT_FIELDS = ("loss", "weight", "train", "trainable")  # a turn with one of them false or 0 is not to be learnt
_OTHER_MEDIA = ("video", "audio", "video_url", "audio_url", "input_audio")

# An image of a part; None if the part stands for the next image of the row.
PartImage = RowImage | None


def read_turns(value: Any, field: str) -> tuple[tuple[Turn, ...], tuple[PartImage, ...]]:
    """The turns of a list of messages, and the images of their parts in order. Errors: `RowError` naming the turn."""
    if not isinstance(value, list) or not value:
        raise RowError("malformed row", f"field '{field}' must be a list of turns, at least one")
    turns: list[Turn] = []
    images: list[PartImage] = []
    for index, message in enumerate(value):
        turn, found = _turn(message, f"'{field}' turn {index}")
        if turns and turn.role == turns[-1].role == "tool_calls":
            turns[-1] = joined_calls(turns[-1], turn)
        else:
            turns.append(turn)
        images += found
    return tuple(turns), tuple(images)


def read_pairs(value: Any, field: str) -> tuple[Turn, ...]:
    """The turns of a list of questions and answers. Errors: `RowError` naming the pair."""
    if not isinstance(value, list) or not value:
        raise RowError("malformed row", f"field '{field}' must be a list of pairs, at least one")
    turns: list[Turn] = []
    for index, pair in enumerate(value):
        ask, answer = (pair.get("user"), pair.get("assistant")) if isinstance(pair, Mapping) else (None, None)
        if not isinstance(ask, str) or not isinstance(answer, str):
            raise RowError("malformed row", f"'{field}' pair {index}: expected strings 'user' and 'assistant'")
        turns += [Turn("user", ask), Turn("assistant", answer)]
    return tuple(turns)


def _turn(message: Any, where: str) -> tuple[Turn, list[PartImage]]:
    if not isinstance(message, Mapping):
        raise RowError("malformed row", f"{where}: expected an object of {_TURN_FIELDS}")
    speaker = message.get("from") if message.get("from") is not None else message.get("role")
    content = message.get("value") if message.get("value") is not None else message.get("content")
    about_tools = tool_turn(speaker, message, content, where) if isinstance(speaker, str) else None
    if about_tools is not None:
        return about_tools, []
    if not isinstance(speaker, str) or not isinstance(content, str | list):
        raise RowError("malformed row", f"{where}: expected an object of {_TURN_FIELDS}")
    if speaker not in _ROLES:
        raise RowError("bad conversation", f"{where} is by '{speaker}', expected 'human' or 'gpt'")
    unlearnt = next((name for name in _WEIGHT_FIELDS if message.get(name) in (False, 0)), None)
    if unlearnt is not None and _ROLES[speaker] == "assistant":
        raise RowError("bad conversation", f"{where} has '{unlearnt}' {message[unlearnt]}, but every answer is learnt")
    if isinstance(content, str):
        return Turn(_ROLES[speaker], content), []
    text, images = _join(content, where)
    return Turn(_ROLES[speaker], text), images


def _join(parts: Sequence[Any], where: str) -> tuple[str, list[PartImage]]:
    """The text of parts, with placeholders, and their images."""
    text, after_image = "", False
    images: list[PartImage] = []
    for index, part in enumerate(parts):
        piece, image = _piece(part, f"{where}, part {index}")
        is_image = piece is None
        piece = IMAGE_PLACEHOLDER if piece is None else piece
        if is_image:
            images.append(image)
        if text and piece and (is_image or after_image) and not (text[-1].isspace() or piece[0].isspace()):
            text += "\n"
        text += piece
        after_image = is_image if piece else after_image
    return text, images


def _piece(part: Any, where: str) -> tuple[str | None, PartImage]:
    """The text of a part, or None and its image."""
    if isinstance(part, str):
        return part, None
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"]), None
    if kind in ("image", "image_url", "input_image"):
        source = next((part[name] for name in ("image_url", "image") if part.get(name) is not None), part)
        held = isinstance(source, str | bytes) or any(source.get(name) is not None for name in SOURCES)
        return None, row_images([source], where)[0] if held else None
    if kind in _OTHER_MEDIA:
        raise RowError("unsupported media", f"{where} is {kind}: only text and images are supported")
    raise RowError("malformed row", f"{where}: expected a part of type 'text' or 'image', found {kind!r}")
