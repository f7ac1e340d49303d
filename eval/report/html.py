"""The comparison as one self-contained HTML page: table, bars, every metric, and a browser of disagreements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
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
    references,
)
from eval.task import Headline
from eval.tasks import get_task
from llavamod_offline.errors import DataError, EvalError
from llavamod_offline.pages.page import render, thumbnail


def page(runs: Sequence[ScoredRun], examples: Mapping[str, Sequence[Example[Any]]], *, samples: int) -> str:
    """The whole page."""
    columns = headlines(runs)
    counts = [
        dict.fromkeys(str(run.scores[column.task].n) for run in runs if column.task in run.scores) for column in columns
    ]
    return render(
        Path(__file__).with_name("page.html.jinja"),
        styles=["page.css"],
        scripts=["page.js"],
        title="Comparison" if len(runs) > 1 else f"Scores of {runs[0].name}",
        lead=", ".join(get_task(task).headlines[0].title for task in examples),
        runs=runs,
        columns=columns,
        published=references(columns),
        notes=footnotes(runs, columns),
        counts=[" / ".join(found) for found in counts],
        charts=[_bars(runs, column) for column in columns],
        details={task: _metrics(task, [run for run in runs if task in run.scores]) for task in examples},
        samples=_samples(runs, examples, samples),
        differences=partial(_differences, runs),
        incomparable=incomparable,
    )


def disagreements(
    runs: Sequence[ScoredRun], task: str, examples: Sequence[Example[Any]], limit: int
) -> list[Example[Any]]:
    """Examples on which the scores of two runs differ, at most `limit` per pair, spread over the set.

    For a single run, examples that it answers wrong.
    """
    verdicts = [run.scores[task].verdicts for run in runs if task in run.scores]
    chosen: dict[str, Example[Any]] = {}
    for pair in combinations(verdicts, 2) if len(runs) > 1 else [(verdicts[0],)]:
        scored = [(example, [found[example.id].right for found in pair if example.id in found]) for example in examples]
        differing = [e for e, right in scored if len({*right, *([1.0] if len(pair) == 1 and right else [])}) > 1]
        step = max(1.0, len(differing) / max(limit, 1))
        chosen |= {e.id: e for e in (differing[int(n * step)] for n in range(min(limit, len(differing))))}
    return [example for example in examples if example.id in chosen]


def _differences(runs: Sequence[ScoredRun], column: Headline, value: float | None, of: ScoredRun | None) -> list[str]:
    """A figure's difference from that of each run, which may be chosen as the baseline; `of`: None if published."""
    return [
        difference(column, value, run.figure(column)) if of is None or comparable(column, of, run) else "‡"
        for run in runs
    ]


def _bars(runs: Sequence[ScoredRun], column: Headline) -> dict[str, Any]:
    """The bars of a headline; marks show published figures that may be compared."""
    found = [(run.name, run.figure(column)) for run in runs]
    published = [] if incomparable(column, runs) else references([column])
    marks = [(f"{model.model}, published", model.figures[column.key]) for model in published]
    # Bars start at zero; rates far below the best possible value get their own scale.
    largest = max([value for _, value in [*found, *marks] if value is not None], default=0.0)
    return {
        "title": column.title,
        "note": f"{'%' if column.percent else 'points'}, {'lower' if column.lower_is_better else 'higher'} is better",
        "rows": [(name, value, "–" if value is None else column.shown(value)) for name, value in found],
        "largest": min(column.best, largest * 1.25),
        "marks": [(name, value, column.shown(value)) for name, value in marks],
    }


def _metrics(task: str, scored: Sequence[ScoredRun]) -> dict[str, Any]:
    """The runs with a score for a task, and (metric, a value per run)."""
    scores = [run.scores[task] for run in scored]
    rows = [
        (name, [_four_digits(score.metrics.get(name)) for score in scores])
        for name in dict.fromkeys(name for score in scores for name in score.metrics)
    ]
    rows += [
        (name, [str(getattr(score, name)) for score in scores])
        for name in ("n", "n_missing", "n_unanswerable", "n_unparsed")
    ]
    return {"runs": scored, "rows": rows}


def _four_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _samples(runs: Sequence[ScoredRun], examples: Mapping[str, Sequence[Example[Any]]], limit: int) -> dict[str, Any]:
    tasks = []
    for task, asked in examples.items():
        found = [_sample(runs, task, example) for example in disagreements(runs, task, asked, limit)]
        if found:
            tasks.append({"task": task, "samples": found})
    return {"runs": [run.name for run in runs], "tasks": tasks}


def _sample(runs: Sequence[ScoredRun], task: str, example: Example[Any]) -> dict[str, Any]:
    answers: list[dict[str, Any] | None] = []
    for run in runs:
        score = run.scores.get(task)
        verdict = None if score is None else score.verdicts.get(example.id)
        if score is None or verdict is None:
            answers.append(None)
        else:
            text = score.texts[example.id] or ""
            answers.append({"text": text, "read": verdict.read_as, "right": verdict.right})
    return {
        "id": example.id,
        "name": example.image,
        "prompt": example.prompt,
        "reference": get_task(task).reference(example),
        "image": _thumbnail(example),
        "answers": answers,
    }


def _thumbnail(example: Example[Any]) -> str:
    """A small copy of the image as a data URI; empty if it is missing or unreadable."""
    if example.source is None:
        return ""
    try:
        return thumbnail(example.source.read(), name=example.source.name)[0]
    except (DataError, EvalError):
        return ""
