"""Comparing models: their scores beside published figures, as one HTML page or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.example import Example
from eval.report.comparison import (
    ScoredRun,
    comparable,
    difference,
    footnotes,
    headlines,
    incomparable,
    load_run,
    references,
    run_names,
)
from eval.task import Headline
from eval.tasks import TASKS, get_task
from llavamod_offline.errors import ConfigError, EvalError
from llavamod_offline.storage.atomic import write_file


def write_report(
    paths: Sequence[Path],
    root: Path,
    output: Path,
    *,
    samples: int = 24,
    judge_model: str = "",
    judge_template: Path | None = None,
) -> None:
    """Score the runs' predictions and write the comparison, with `samples` disagreements per benchmark and pair.

    `judge_model`, `judge_template`: as in `load_run`. Errors: `ConfigError` for a suffix other than .html and .md;
    `EvalError` for a folder without predictions, or if nothing can be scored.
    """
    if output.suffix not in (".html", ".md"):
        raise ConfigError(f"{output}: a report's name must end in .html or .md")
    runs = [
        load_run(path, root, name, judge_model=judge_model, judge_template=judge_template)
        for path, name in zip(paths, run_names(paths), strict=True)
    ]
    if not any(run.scores for run in runs):
        found = "; ".join(f"{run.name}: {task}: {why}" for run in runs for task, why in run.unscored.items())
        raise EvalError(f"nothing can be scored: {found}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".md":
        write_file(output, markdown(runs))
        return
    from eval.report.html import page

    tasks = [task for task in TASKS if any(task in run.scores for run in runs)]
    examples: dict[str, list[Example[Any]]] = {task: get_task(task).load(root) for task in tasks}
    write_file(output, page(runs, examples, samples=samples))


def markdown(runs: Sequence[ScoredRun]) -> str:
    """The comparison as Markdown."""
    columns = headlines(runs)
    titles = [f"{column.title} {'↓' if column.lower_is_better else '↑'}" for column in columns]
    lines = ["# Comparison", "", "| model | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(columns)]
    for run in runs:
        cells = []
        for column in columns:
            alike = comparable(column, run, runs[0])
            base = runs[0].figure(column) if alike and run is not runs[0] else None
            cells.append(_cell(column, run.figure(column), base) + ("" if alike else "‡"))
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
            protocol = score.protocol.replace("`", "'")
            lines.append(f"- **{_escaped(run.name)}**, {task}: {score.counts}; `{protocol}`")
        lines += [f"- **{_escaped(run.name)}**, {task}: not scored: {why}" for task, why in run.unscored.items()]
    return "\n".join(lines) + "\n"


def _cell(column: Headline, value: float | None, base: float | None) -> str:
    if value is None:
        return "–"
    gap = difference(column, value, base)
    return column.shown(value) + (f" ({gap})" if gap else "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
