"""Rows in the known formats → samples; the same fields in JSON, JSON Lines, parquet and the JSON of tars.

    conversation   `conversations` or `messages`, a list of turns; `texts`, a list of pairs (see `messages.py`); or
                   `prompt` and `completion`
    preference     `chosen` and `rejected`, each a whole conversation (LLaVA-MoD), or answers to `prompt`, `question`
                   (RLAIF-V), `messages` or `conversations`; or `messages` and `rejected_response` (ms-swift)
    unpaired       a conversation or `prompt` and `completion`, with `label` (TRL, ms-swift) or `kto_tag`
                   (LlamaFactory): whether its last answer is desirable
    images         `image` or `images` (see `row_images.py`), in the order of `<image>` in the users' texts; or in parts

`system`: the text of a system turn; `tools`: what the assistant may call (see `tool_messages.py`). Images of `texts`
and of a `question` without `<image>` come before the first text. Several rejected answers make several samples. A row
that breaks the format is a `RowError`; nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llavamod_offline.data.parse.messages import PartImage, read_pairs, read_turns
from llavamod_offline.data.parse.row_images import ReadImage, RowImage, image_extensions, load_images, row_images
from llavamod_offline.data.parse.tool_messages import read_tools
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import DataError
from llavamod_offline.plural import counted

TEXT_FIELDS = ("conversations", "messages", "texts", "chosen", "rejected", "rejected_response", "completion")
LABELS = ("label", "kto_tag")
FIELDS = (*TEXT_FIELDS, *LABELS, "prompt", "question", "system", "tools", "image", "images")
_OTHER_PROMPTS = {"conversations", "messages", "prompt"}  # other than RLAIF-V's question
MEDIA_FIELDS = ("video", "videos", "audio", "audios")
KNOWN = (
    "'conversations' or 'messages' (turns), 'texts' (pairs), 'prompt' and 'completion', or 'chosen' and 'rejected' "
    "(answers to a 'prompt', or whole conversations)"
)


@dataclass(frozen=True)
class ParsedRow:
    """The contents of a row; the turns of a preference are its prompt."""

    turns: tuple[Turn, ...]
    images: tuple[RowImage, ...] = ()
    chosen: str | None = None
    rejected: str | None = None


def row_to_sample(row: Any, *, key: str, source: str, read_image: ReadImage, max_side: int | None = None) -> Sample:
    """Build a sample from a row. `max_side`: what its images will be shrunk to, see `decode_image`."""
    parsed = parse_row(row)
    _check_placeholders(parsed.turns, len(parsed.images))
    contents = load_images(parsed.images, read_image)
    sample = _build(key, parsed, contents, image_extensions(contents, parsed.images, max_side), source)
    check_text(sample)
    return sample


def tar_row_to_sample(
    row: Any, *, key: str, source: str, images: tuple[bytes, ...], extensions: tuple[str, ...]
) -> Sample:
    """Build a sample from a row in a tar that also holds its images; the row need not name them."""
    parsed = parse_row(row, len(images))
    if parsed.images and len(parsed.images) != len(images):
        reason = f"the row names {counted(len(parsed.images), 'image')}, the tar holds {len(images)}"
        raise RowError("placeholder mismatch", reason)
    _check_placeholders(parsed.turns, len(images))
    return _build(key, parsed, images, extensions, source)


def responses_of_row(row: Any) -> tuple[str, ...]:
    """The chosen and the rejected response of a preference, or the only one of an unpaired answer."""
    _, _, *answers = _dialogue(_fields(row))
    found = tuple(answer for answer in answers if answer is not None)
    if not found:
        raise RowError("malformed row", "has no 'chosen' and 'rejected'")
    return found


def one_for_each_rejected(row: Any) -> list[Any]:
    """Split a row whose preference lists several rejected answers into one row for each; else return the row itself."""
    for name in ("rejected", "rejected_response"):
        answers = row.get(name) if isinstance(row, Mapping) else None
        if isinstance(answers, list) and answers and all(isinstance(answer, str | list) for answer in answers):
            return [{**row, name: answer} for answer in answers]
    return [row]


def parse_row(row: Any, beside: int = 0) -> ParsedRow:
    """Read a row in any of the formats; `beside`: how many images lie beside it. Errors: `RowError`."""
    fields = _fields(row)
    turns, parts, chosen, rejected = _dialogue(fields)
    images = _in_order(parts, _held_images(fields) or (RowImage("beside"),) * beside)
    is_question = isinstance(fields.get("chosen"), str) and not _OTHER_PROMPTS & fields.keys()
    if is_question and not images and "image" in row:
        raise RowError("missing image", "field 'image' is empty")
    if (is_question or "texts" in fields) and not any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        turns = (replace(turns[0], text=f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[0].text), *turns[1:])
    system = fields.get("system")
    if not isinstance(system, str | None):
        raise RowError("malformed row", f"field 'system' must be text, found {type(system).__name__}")
    if system and system.strip():
        turns = (Turn("system", system), *turns)
    tools = read_tools(fields.get("tools"))
    if tools is not None:
        turns = (tools, *turns)
    return ParsedRow(turns, images, chosen, rejected)


def same_answers(chosen: str, rejected: str) -> bool:
    """Whether two answers differ only in the white space around them, so that the pair teaches nothing."""
    return chosen.strip() == rejected.strip()


def check_text(sample: Sample) -> None:
    """Refuse texts that no sample should have, although sets of earlier versions have some. Errors: `RowError`."""
    if sample.chosen is not None and sample.rejected is not None and same_answers(sample.chosen, sample.rejected):
        raise RowError("identical answers", "the chosen and the rejected answer are the same")
    texts = [*(turn.text for turn in sample.turns), sample.chosen or "", sample.rejected or ""]
    if any("\0" in text for text in texts):
        raise RowError("bad conversation", "its text holds a NUL character")


def _fields(row: Any) -> dict[str, Any]:
    """The fields of a row that are not null."""
    if not isinstance(row, Mapping):
        raise RowError("malformed row", f"expected an object, found {type(row).__name__}")
    fields = {str(name): value for name, value in row.items() if value is not None}
    media = next((name for name in MEDIA_FIELDS if fields.get(name)), None)
    if media is not None:
        raise RowError("unsupported media", f"has field '{media}': only text and images are supported")
    return fields


Dialogue = tuple[tuple[Turn, ...], tuple[PartImage, ...], str | None, str | None]


def _dialogue(fields: Mapping[str, Any]) -> Dialogue:
    """A row's turns (of a preference: its prompt), images of parts, chosen and rejected answer."""
    histories = [name for name in ("conversations", "messages", "texts") if name in fields]
    if len(histories) > 1:
        raise RowError("malformed row", f"has both '{histories[0]}' and '{histories[1]}': keep one")
    if "rejected_response" in fields:
        return _with_rejected(fields)
    if "chosen" in fields or "rejected" in fields:
        return _preference(fields, histories)
    if histories:
        if histories[0] == "texts":
            return read_pairs(fields["texts"], "texts"), (), None, None
        return _labelled(fields, *_all(fields, histories[0]))
    if "prompt" in fields and "completion" in fields:
        turns, images = _all(fields, "prompt")
        answer, more = _all(fields, "completion", "assistant")
        if any(name in fields for name in LABELS):
            return _labelled(fields, (*turns, *answer), (*images, *more))
        earlier = [turn for turn in turns if turn.role == "assistant"]
        if earlier:
            raise RowError("bad conversation", "'prompt' has answers, but every answer is learnt: use 'messages'")
        return (*turns, *answer), (*images, *more), None, None
    found = ", ".join(f"'{name}'" for name in list(fields)[:8]) or "none"
    raise RowError("malformed row", f"its fields are {found}: expected {KNOWN}")


def _all(fields: Mapping[str, Any], name: str, role: Any = "user") -> tuple[tuple[Turn, ...], tuple[PartImage, ...]]:
    """The turns of a field that is a list of turns, or a text by one role."""
    value = fields[name]
    if isinstance(value, str) and name not in ("conversations", "messages"):
        return (Turn(role, value),), ()
    return read_turns([value] if isinstance(value, Mapping) and name in ("chosen", "rejected") else value, name)


def _preference(fields: Mapping[str, Any], histories: list[str]) -> Dialogue:
    """`chosen` and `rejected`, with their prompt or after it."""
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise RowError("malformed row", f"field '{name}' must be a list of turns or a text")
    prompts = [name for name in (*histories, "prompt", "question") if name in fields]
    if not prompts and isinstance(fields["chosen"], str):
        raise RowError("malformed row", "field 'chosen' must be a list of turns, or there must be a 'prompt'")
    (chosen, images), (rejected, others) = (_all(fields, name, "assistant") for name in ("chosen", "rejected"))
    if prompts:
        if "texts" in prompts:
            raise RowError("malformed row", "'texts' cannot be the prompt of 'chosen' and 'rejected'")
        turns, before = _all(fields, prompts[0])
        if chosen[:1] != turns[:1]:  # else both repeat the prompt
            chosen, rejected, images, others = (*turns, *chosen), (*turns, *rejected), before + images, before + others
    if chosen[:-1] != rejected[:-1] or images != others:
        raise RowError("bad conversation", "'chosen' and 'rejected' answer different prompts")
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise RowError("bad conversation", "'chosen' and 'rejected' must end with an answer by 'gpt' or 'assistant'")
    return chosen[:-1], images, chosen[-1].text, rejected[-1].text


def _labelled(fields: Mapping[str, Any], turns: tuple[Turn, ...], images: tuple[PartImage, ...]) -> Dialogue:
    """A conversation, or if it has a label, the unpaired answer that it ends with."""
    name = next((name for name in LABELS if name in fields), "")
    label = fields.get(name)
    judged = "completion" in fields or name == "kto_tag"
    if name and not isinstance(label, bool) and (judged or isinstance(label, int | float)):
        reason = f"field '{name}' is {label!r}: expected true or false, whether the last answer is desirable"
        raise RowError("malformed row", reason if judged else f"{reason}; if it says something else, rename it")
    if not isinstance(label, bool):
        return turns, images, None, None
    if turns[-1].role != "assistant":
        raise RowError("bad conversation", f"has '{name}', but does not end with an answer by 'gpt' or 'assistant'")
    return turns[:-1], images, *((turns[-1].text, None) if label else (None, turns[-1].text))


def _with_rejected(fields: Mapping[str, Any]) -> Dialogue:
    """`messages` that end with the chosen answer, and the rejected one."""
    if "messages" not in fields:
        raise RowError("malformed row", "has 'rejected_response' without 'messages'")
    turns, images = read_turns(fields["messages"], "messages")
    other = fields["rejected_response"]
    if turns[-1].role != "assistant" or not isinstance(other, str):
        raise RowError("malformed row", "'messages' must end with an answer, and 'rejected_response' be a text")
    return turns[:-1], images, turns[-1].text, other


def _held_images(fields: Mapping[str, Any]) -> tuple[RowImage, ...]:
    """The images of the row's own fields; None where they are given twice."""
    image, images = (row_images(fields.get(name), name) for name in ("image", "images"))
    if image and images and image != images[: len(image)]:
        raise RowError("malformed row", "has both 'image' and 'images': keep one")
    return images or image


def _in_order(parts: tuple[PartImage, ...], held: tuple[RowImage, ...]) -> tuple[RowImage, ...]:
    """The images of parts, those without one filled from the row's in order; without parts, the row's."""
    left = list(held)
    images = [left.pop(0) if part is None and left else part for part in parts]
    absent = images.count(None)
    if absent:
        reason = f"{counted(len(parts), 'image part')} for {counted(len(parts) - absent, 'image')}"
        raise RowError("placeholder mismatch", reason)
    return (*(image for image in images if image is not None), *left)


def _build(key: str, parsed: ParsedRow, images: tuple[bytes, ...], extensions: tuple[str, ...], source: str) -> Sample:
    try:
        return Sample(key, parsed.turns, images, extensions, parsed.chosen, parsed.rejected, source)
    except DataError as error:
        raise RowError("bad conversation", str(error).removeprefix(f"sample '{key}': ")) from error


def _check_placeholders(turns: tuple[Turn, ...], images: int) -> None:
    found = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if images and not found:
        said = f"has {counted(images, 'image')} that its text does not refer to (0 '{IMAGE_PLACEHOLDER}')"
        hint = f"put '{IMAGE_PLACEHOLDER}' where a user's turn refers to it, or remove the image"
        raise RowError("placeholder mismatch", f"{said}: {hint}")
    if found != images:
        reason = f"{found} '{IMAGE_PLACEHOLDER}' in the user's turns for {counted(images, 'image')}"
        raise RowError("placeholder mismatch", reason)
