"""What a benchmark is to this project: examples to answer, and a pure function that scores the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from eval.files import EmbeddedImage, FileImage

R = TypeVar("R", covariant=True)
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(slots=True)  # not frozen: there are hundreds of thousands, and frozen ones take thrice as long to make
class Example(Generic[R]):
    """One question of a benchmark.

    `id` is unique in its task and names the example in our predictions. `aliases` are the `question_id`s by which
    LLaVA-style answer files may name it; where several examples share one, `question` tells them apart.
    `prompt` is the published wording without the image's placeholder, which always comes first. `image` is the name
    that the benchmark's files give the image, `source` where its bytes are (None: a question without an image).
    `question_id` is the id in the type of the question file, for LLaVA's scripts (None: it is `id`).
    `reference` is what scoring compares answers with; it is the task's own business.
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
    """What scoring made of one answer: how it was read (empty: not at all) and its share of being right, 0 to 1."""

    read_as: str
    right: float


@dataclass(frozen=True)
class Scored:
    """A task's result. A metric is None where the data leave it undefined; `notes` go into the protocol."""

    metrics: dict[str, float | None]
    n_unparsed: int = 0
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Task(Protocol):
    """The names a task's module has. All of them start without torch.

    `HEADLINE` is the metric that papers quote, `OFFICIAL_N` the numbers of questions of the published sets,
    `MAX_NEW_TOKENS` the published limit of an answer, `PROTOCOL` the published prompt and reading of answers in words.
    """

    NAME: str
    HEADLINE: str
    OFFICIAL_N: tuple[int, ...]
    MAX_NEW_TOKENS: int
    PROTOCOL: str

    def load(self, root: Path) -> list[Example[Any]]:
        """Read the questions, with their references, from LLaVA-1.5's folder layout below `root`."""
        ...

    def reference_files(self, root: Path) -> list[Path]:
        """The files that `load` reads, for their checksum."""
        ...

    def question_key(self, prompt: str) -> str:
        """Reduce a prompt to the question it asks, as `Example.question` holds it."""
        ...

    def score(self, examples: Sequence[Example[Any]], texts: Mapping[str, str | None]) -> Scored:
        """Score answers by example id; None is a missing answer, which counts as wrong."""
        ...


def first_line_key(prompt: str) -> str:
    """The first line of a prompt in lower case with single spaces: the question, where nothing comes before it."""
    lines = prompt.removeprefix("<image>\n").strip().split("\n")
    return " ".join(lines[0].lower().split())
