"""A benchmark's questions, and the results of scoring their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from eval.files import EmbeddedImage, FileImage

R = TypeVar("R", covariant=True)
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(slots=True)  # not frozen: creating hundreds of thousands would take three times as long
class Example(Generic[R]):
    """One question of a benchmark.

    `id` is unique in its task and names the example in our predictions. `aliases`: the `question_id`s by which
    LLaVA-style answer files may name it; `question` distinguishes examples that share one.
    `prompt`: the published wording without the image placeholder, which always comes first. `image`: the image's name
    in the benchmark's files; `source`: where its bytes are (None: no image).
    `question_id`: the id in the type of the question file, for LLaVA's scripts (None: `id`).
    `reference`: what the task's scoring compares answers with.
    """

    id: str
    prompt: str
    reference: R
    image: str = ""
    source: FileImage | EmbeddedImage | None = None
    aliases: tuple[str, ...] = ()
    question: str = ""
    question_id: str | int | None = None


@dataclass(slots=True)  # not frozen, as above
class Verdict:
    """The score of one answer: how it was read (empty: unreadable) and its credit, 0 to 1."""

    read_as: str
    right: float


@dataclass(frozen=True)
class Scored:
    """A task's result. An undefined metric is None; `notes` go into the protocol."""

    metrics: dict[str, float | None]
    n_unparsed: int = 0
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def first_line_key(prompt: str) -> str:
    """The first line of a prompt in lower case with single spaces."""
    lines = prompt.removeprefix("<image>\n").strip().split("\n")
    return " ".join(lines[0].lower().split())
