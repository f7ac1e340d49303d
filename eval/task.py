"""The definition of a benchmark: a module of `eval/tasks/` that ends in a `Task` and has an entry in `TASKS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.example import Example, Scored, first_line_key
from eval.judge_template import JudgeTemplate
from llavamod_offline.errors import ConfigError

UNREADABLE_ALLOWED = 0.02


@dataclass(frozen=True)
class Headline:
    """A column of the comparison: a task's metric, its title, and its best value, which scales the bars.

    `published`: figures of the models in `report/comparison.py`, in this project's units. `not_comparable`: why they
    measure something other than the metric; the report then shows no difference.
    """

    task: str
    metric: str
    title: str
    best: float = 1.0
    lower_is_better: bool = False
    percent: bool = True
    published: Mapping[str, float] = field(default_factory=dict)
    not_comparable: str = ""

    @property
    def key(self) -> str:
        """A name of the column that is unique among all tasks."""
        return f"{self.task}.{self.metric}"

    def shown(self, value: float) -> str:
        """Format a figure for tables and charts."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.1f}" if self.best > 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Upload:
    """The file that a benchmark's server or official script takes: `content` makes it from texts by example id.

    `package`: the Python package of the extra `eval` that `content` imports.
    """

    suffix: str
    content: Callable[[Sequence[Example[Any]], Mapping[str, str]], str | bytes]
    package: str = ""

    def check(self) -> None:
        """Raise `ConfigError` if the package is not installed."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise ConfigError(f"{self.suffix} files need {self.package}: pip install 'llavamod-offline[eval]'")


@dataclass(frozen=True)
class Judging:
    """How a judge scores a task.

    `slots` fills the template for an answer; None: the judge is not asked about it. `score` takes the replies by
    example id. `protocol` replaces the task's; "JUDGE" in it becomes the judge's model.
    """

    template: JudgeTemplate
    slots: Callable[[Example[Any], str], dict[str, str] | None]
    score: Callable[[Sequence[Example[Any]], Mapping[str, str | None], Mapping[str, str]], Scored]
    protocol: str


@dataclass(frozen=True)
class Task:
    """A benchmark. Loading and scoring import no torch.

    `load` reads questions and references from LLaVA-1.5's folder layout below a root; `reference_files` lists the
    files it reads, for their checksum. `score` takes answers by example id; None is a missing answer, which counts as
    wrong. A task without `score` needs a judge. `official_n`: sizes of the published sets. `max_new_tokens`: the
    published limit of an answer. `protocol`: the published prompt and how answers are read, in words.
    `reference` puts the right answer into words for a report.
    `group`: what the examples share that are scored together, if any are; a limit does not separate them.
    `question_key` reduces a prompt to its question, as `Example.question` holds it. `llava_prompt` returns the prompt
    that LLaVA's runners record.
    """

    name: str
    headlines: tuple[Headline, ...]
    official_n: tuple[int, ...]
    max_new_tokens: int
    protocol: str
    load: Callable[[Path], list[Example[Any]]]
    reference_files: Callable[[Path], list[Path]]
    score: Callable[[Sequence[Example[Any]], Mapping[str, str | None]], Scored] | None
    reference: Callable[[Example[Any]], str]
    question_key: Callable[[str], str] = first_line_key
    llava_prompt: Callable[[Example[Any]], str] = lambda example: example.prompt
    upload: Upload | None = None
    judging: Judging | None = None
    group: Callable[[Example[Any]], Hashable] | None = None

    def first(self, examples: Sequence[Example[Any]], limit: int | None) -> list[Example[Any]]:
        """The first `limit` examples (None: all), and the others of their groups."""
        if limit is None or self.group is None:
            return list(examples[:limit])
        chosen = {self.group(example) for example in examples[:limit]}
        return [example for example in examples if self.group(example) in chosen]


def withhold_unreadable(scored: Scored, count: int) -> Scored:
    """Drop the metrics if more than 2 % of a judge's `count` replies cannot be read."""
    if scored.n_unparsed <= UNREADABLE_ALLOWED * count:
        return scored
    note = f"no headline: {scored.n_unparsed} of {count} replies of the judge cannot be read (2 % at most)"
    return replace(scored, metrics=dict.fromkeys(scored.metrics), notes=(*scored.notes, note))
