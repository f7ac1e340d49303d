"""A sample: one conversation with zero or more images, or one prompt with a chosen or a rejected response, or both.

A conversation may begin with a list of tools and a system turn, and an answer may follow calls of tools and their
results; these turns are JSON, see `tools.py`. In a WebDataset tar a sample is `{key}.json` beside
`{key}.{jpg,png,webp}` (with several images `{key}.0.jpg`, `{key}.1.png`…). The JSON is an object: `format` (1),
`source`, `turns` (list of `[role, text]`), `chosen` and `rejected` (strings, preference samples only; one of them if
unpaired), `images` (list of file extensions), `content_hash`; if a teacher wrote the answer, `generated` (an object,
see `Generated`); if packing shrank images, `original_sizes` (a list of `[width, height]`, null for unchanged ones).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from llavamod_offline.errors import DataError
from llavamod_offline.plural import counted

SAMPLE_FORMAT = 1
IMAGE_PLACEHOLDER = "<image>"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_\-]{1,200}")

# The sequences of each kind of sample. A desirable or undesirable answer is one half of a pair, as KTO learns from it.
ROLES_OF_KIND = {
    "conversation": ("response",),
    "preference": ("chosen", "rejected"),
    "desirable": ("chosen",),
    "undesirable": ("rejected",),
}

_FIRST_FIELDS = ("teacher", "set_digest", "key", "turns", "temperature", "top_p", "max_new_tokens", "seed")

Role = Literal["tools", "system", "user", "tool_calls", "tool", "assistant"]
Size = tuple[int, int]

# Who may speak after whom; the most expected comes last.
_FOLLOWING: Mapping[Role, tuple[str, ...]] = {
    "tools": ("system", "user"),
    "system": ("user",),
    "user": ("tool_calls", "assistant"),
    "tool_calls": ("tool",),
    "tool": ("tool", "tool_calls", "assistant"),
    "assistant": ("user",),
}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `<image>` in a user's text marks the position of the next image."""

    role: Role
    text: str


@dataclass(frozen=True)
class Generated:
    """The origin of a teacher's answer: the prompt's sample, the teacher, and the settings.

    `teacher`: SHA-256 (hex) over the checkpoint's configuration and weights; `set_digest` and `key`: of the source
    sample. `temperature` 0: greedy. `turns`: which of the assistant's turns the teacher wrote. `round`: for a student's
    own answers, the number of the round.

    `behaviour_log_probs`: for each written turn, the writer's log-prob of each of its tokens, the one that ends it
    included, under the distribution that they were drawn from (temperature 0: the writer's own at temperature 1). None
    for a turn whose text tokenizes differently from what was written, or that a given stop text ended. Empty in sets
    that kept none.
    """

    teacher: str
    set_digest: str
    key: str
    turns: Literal["last", "all"]
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    round: int | None = None
    behaviour_log_probs: tuple[tuple[float, ...] | None, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Generated:
        """Read the result of `to_json`, or of an earlier version."""
        log_probs = tuple(None if own is None else tuple(own) for own in content.get("behaviour_log_probs", ()))
        return cls(**{**content, "behaviour_log_probs": log_probs})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, without optional ones that are empty."""
        return {name: value for name, value in asdict(self).items() if name in _FIRST_FIELDS or value}


@dataclass(frozen=True)
class Sample:
    """A validated sample; `turns` of a preference sample end with the user, those of a conversation with the assistant.

    `images` are encoded files in the order of their placeholders, `image_extensions` their formats. `generated`: the
    origin of an answer that a teacher wrote. `mismatched`: the response of another preference sample, which a set may
    add (see `mismatched.py`); it is not part of the sample's file.
    Errors: `DataError` naming the key if the turns do not alternate, are empty, or do not match the images.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    image_extensions: tuple[str, ...] = ()
    chosen: str | None = None
    rejected: str | None = None
    source: str = ""
    generated: Generated | None = None
    mismatched: str | None = None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise DataError(f"sample '{self.key}': {problem}")

    @property
    def is_preference(self) -> bool:
        """Whether the sample holds a chosen or a rejected response, or both, instead of an assistant's last turn."""
        return self.kind != "conversation"

    @property
    def kind(self) -> str:
        """One of `ROLES_OF_KIND`."""
        if self.chosen is None:
            return "conversation" if self.rejected is None else "undesirable"
        return "desirable" if self.rejected is None else "preference"

    @property
    def roles(self) -> tuple[str, ...]:
        """The sample's sequences: `response`, or `chosen` or `rejected` or both and, if it has one, `mismatched`."""
        roles = ROLES_OF_KIND[self.kind]
        return roles if self.mismatched is None else (*roles, "mismatched")

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over the sample's own text and the image bytes, without the key."""
        digest = hashlib.sha256()
        text = json.dumps([[t.role, t.text] for t in self.turns] + [self.chosen, self.rejected], ensure_ascii=False)
        for part in (text.encode(), *self.images):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def conversation(self, role: str) -> tuple[Turn, ...]:
        """The turns of one role: the conversation itself, or the prompt with that role's response appended."""
        if role not in self.roles:
            raise DataError(f"sample '{self.key}' has no role '{role}': it has {', '.join(self.roles)}")
        if not self.is_preference:
            return self.turns
        response = {"chosen": self.chosen, "rejected": self.rejected, "mismatched": self.mismatched}[role]
        assert response is not None
        return (*self.turns, Turn("assistant", response))


def sample_to_json(sample: Sample, original_sizes: Sequence[Size | None] = ()) -> bytes:
    """Serialise everything but the images, as stored in the tar's `{key}.json`.

    `original_sizes`: the (width, height) of images before packing shrank them, None for the others.
    """
    content: dict[str, Any] = {
        "format": SAMPLE_FORMAT,
        "source": sample.source,
        "turns": [[turn.role, turn.text] for turn in sample.turns],
        "images": list(sample.image_extensions),
        "content_hash": sample.content_hash,
    }
    if sample.is_preference:
        answers = {"chosen": sample.chosen, "rejected": sample.rejected}
        content |= {role: text for role, text in answers.items() if text is not None}
    if sample.generated is not None:
        content["generated"] = sample.generated.to_json()
    if any(original_sizes):
        content["original_sizes"] = list(original_sizes)
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def sample_from_json(key: str, content: bytes | str, images: tuple[bytes, ...]) -> Sample:
    """Rebuild a sample from its JSON and image bytes. Errors: `DataError` naming the key and the field."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"sample '{key}': its JSON cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != SAMPLE_FORMAT:
        raise DataError(f"sample '{key}': not a sample of format {SAMPLE_FORMAT}: pack the set again")
    try:
        turns = tuple(Turn(role, text) for role, text in fields["turns"])
        extensions = tuple(fields["images"])
        generated = Generated.from_json(fields["generated"]) if "generated" in fields else None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"sample '{key}': bad field in its JSON: {error!r}") from error
    return Sample(
        key,
        turns,
        images,
        extensions,
        fields.get("chosen"),
        fields.get("rejected"),
        str(fields.get("source", "")),
        generated,
    )


def _problem(sample: Sample) -> str | None:
    """What is wrong with a sample, if anything."""
    if not KEY_PATTERN.fullmatch(sample.key):
        return "a key must be 1 to 200 letters, digits, '-' or '_'"
    texts = [turn.text for turn in sample.turns]
    texts += [text for text in (sample.chosen, sample.rejected) if text is not None]
    if not sample.turns or not all(isinstance(text, str) for text in texts):
        return "a turn's text is missing or not a string" if sample.turns else "the conversation is empty"
    try:
        "".join([*texts, sample.source]).encode()
    except UnicodeEncodeError:
        return "its text holds a lone surrogate, which is not a character"
    expected: tuple[str, ...] = ("tools", "system", "user")
    for index, turn in enumerate(sample.turns):
        if turn.role not in expected:
            return f"turn {index} is by '{turn.role}', expected '{expected[-1]}'"
        if turn.role == "assistant" and not turn.text.strip():
            return f"turn {index}: the assistant's text is empty"
        expected = _FOLLOWING[turn.role]
    last = sample.turns[-1].role
    if last not in (("user", "tool") if sample.is_preference else ("assistant",)):
        return f"the last turn is by '{last}'"
    if sample.mismatched is not None and not sample.is_preference:
        return "a conversation has no mismatched response"
    if any(text is not None and not text.strip() for text in (sample.chosen, sample.rejected)):
        return "the chosen or the rejected response is empty"
    return _image_problem(sample)


def _image_problem(sample: Sample) -> str | None:
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    answers += [text for text in (sample.chosen, sample.rejected) if text is not None]
    if any(IMAGE_PLACEHOLDER in text for text in answers):
        return f"'{IMAGE_PLACEHOLDER}' is in an answer; only a user's text may hold it"
    holder = next((t.role for t in sample.turns if t.role != "user" and IMAGE_PLACEHOLDER in t.text), None)
    if holder is not None:
        return f"'{IMAGE_PLACEHOLDER}' is in the {holder.replace('_', ' ')} turn; only a user's text may hold it"
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns)
    if placeholders != len(sample.images):
        return f"{placeholders} '{IMAGE_PLACEHOLDER}' in the text for {counted(len(sample.images), 'image')}"
    if len(sample.images) != len(sample.image_extensions):
        return "the numbers of images and of extensions differ"
    unknown = [extension for extension in sample.image_extensions if extension not in IMAGE_EXTENSIONS]
    return f"image format '{unknown[0]}' is none of {', '.join(IMAGE_EXTENSIONS)}" if unknown else None
