"""Comparing models: what each scored, beside published figures, as one HTML page or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.example import Example
from eval.judge import RecordedJudge
from eval.published import HEADLINES, NOT_COMPARABLE, PUBLISHED, Headline, Published
from eval.score import TaskScore, score_task
from eval.tasks import TASKS, get_task
from llavamod_offline.atomic import write_file
from llavamod_offline.errors import ConfigError, EvalError

RECORD = "predictions.judge.jsonl"


@dataclass(frozen=True)
class Run:
    """A model's scores by task; `unscored` says why a task has none."""

    name: str
    scores: dict[str, TaskScore]
    unscored: dict[str, str] = field(default_factory=dict)

    def figure(self, headline: Headline) -> float | None:
        """The run's figure of a headline, or None."""
        score = self.scores.get(headline.task)
        return None if score is None else score.metrics.get(headline.metric)


def write_report(paths: Sequence[Path], root: Path, output: Path, *, samples: int = 24) -> None:
    """Score the runs' predictions and write the comparison; `samples` disagreements a benchmark and pair are shown.

    Errors: `ConfigError` for an ending other than .html and .md; `EvalError` for a folder without predictions, and for
    predictions that cannot be scored.
    """
    if output.suffix not in (".html", ".md"):
        raise ConfigError(f"{output}: a report's name ends with .html or .md")
    runs = [load_run(path, root, name) for path, name in zip(paths, run_names(paths), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".md":
        write_file(output, markdown(runs))
        return
    from eval.report_html import page

    tasks = [task for task in TASKS if any(task in run.scores for run in runs)]
    examples: dict[str, list[Example[Any]]] = {task: get_task(task).load(root) for task in tasks}
    write_file(output, page(runs, examples, samples=samples))


def load_run(path: Path, root: Path, name: str) -> Run:
    """Score every `TASK/predictions.jsonl` of an output folder of `generate`.

    MMHal is scored from the judge's recorded replies, where they lie beside its predictions.
    """
    found = {task: path / task / "predictions.jsonl" for task in TASKS}
    found = {task: file for task, file in found.items() if file.is_file()}
    if not found:
        raise EvalError(f"{path}: no TASK/predictions.jsonl in it: give an output folder of 'eval-student generate'")
    scores, unscored = {}, {}
    for task, file in found.items():
        judge = None
        if task == "mmhal":
            if not (file.parent / RECORD).is_file():
                unscored[task] = f"no {RECORD}: score it with --judge first"
                continue
            judge = RecordedJudge(file.parent / RECORD)
        scores[task] = score_task(task, root, file, judge=judge)
    return Run(name, scores, unscored)


def run_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError("report: a run is named twice")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """The headlines of the tasks that any run has a score of."""
    return [headline for headline in HEADLINES if any(headline.task in run.scores for run in runs)]


def references(columns: Sequence[Headline]) -> list[Published]:
    """The published models that have a figure in any column."""
    return [published for published in PUBLISHED if any(column.key in published.figures for column in columns)]


def incomparable(column: Headline, runs: Sequence[Run]) -> str | None:
    """Why published figures of this headline are of something else than the runs'; None if they are not."""
    if column.key in NOT_COMPARABLE:
        return NOT_COMPARABLE[column.key]
    measured = {run.scores[column.task].n for run in runs if column.task in run.scores}
    official = get_task(column.task).OFFICIAL_N
    if measured - set(official):
        asked, here = " or ".join(map(str, official)), " and ".join(map(str, sorted(measured)))
        return f"published on {asked} questions, measured here on {here}"
    return None


def difference(column: Headline, value: float | None, base: float | None) -> str:
    """A figure's difference from the first run's as tables show it; empty where there is none to show."""
    if value is None or base is None:
        return ""
    sign = "+" if value >= base else "−"
    return f"{sign}{column.shown(abs(value - base))}"


def footnotes(runs: Sequence[Run], columns: Sequence[Headline]) -> list[str]:
    """What the reader of the table must know about published figures."""
    shown = references(columns)
    notes = [f"{published.model}: {published.source}" for published in shown]
    for column in columns:
        why = incomparable(column, runs)
        if why and any(column.key in published.figures for published in shown):
            notes.append(f"† {column.title}: {why}; not to be compared")
    return notes


def markdown(runs: Sequence[Run]) -> str:
    """The comparison as Markdown."""
    columns = headlines(runs)
    titles = [f"{column.title} {'↓' if column.lower_is_better else '↑'}" for column in columns]
    lines = ["# Comparison", "", "| model | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(columns)]
    for run in runs:
        cells = [
            _cell(column, run.figure(column), None if run is runs[0] else runs[0].figure(column)) for column in columns
        ]
        lines.append(f"| **{_escaped(run.name)}** | " + " | ".join(cells) + " |")
    for published in references(columns):
        cells = []
        for column in columns:
            value, other = published.figures.get(column.key), incomparable(column, runs)
            cell = _cell(column, value, None if other else runs[0].figure(column))
            cells.append(f"{cell}†" if other and value is not None else cell)
        lines.append(f"| *{published.model}* (published) | " + " | ".join(cells) + " |")
    lines += ["", f"In parentheses: difference from {_escaped(runs[0].name)}.", ""]
    lines += [f"- {note}" for note in footnotes(runs, columns)]
    lines += ["", "## Protocols", ""]
    for run in runs:
        for task, score in run.scores.items():
            counts = f"n {score.n}, missing {score.n_missing}, unparsed {score.n_unparsed}"
            protocol = score.protocol.replace("`", "'")
            lines.append(f"- **{_escaped(run.name)}**, {task}: {counts}; `{protocol}`")
        lines += [f"- **{_escaped(run.name)}**, {task}: not scored: {why}" for task, why in run.unscored.items()]
    return "\n".join(lines) + "\n"


def _cell(column: Headline, value: float | None, base: float | None) -> str:
    if value is None:
        return "–"
    gap = difference(column, value, base)
    return column.shown(value) + (f" ({gap})" if gap else "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
