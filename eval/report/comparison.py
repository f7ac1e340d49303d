"""Models' scores side by side, and the published figures that they may be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.judge import RecordedJudge
from eval.score import TaskScore, score_task
from eval.task import Headline
from eval.tasks import TASKS, get_task
from llavamod_offline.errors import ConfigError, EvalError
from llavamod_offline.plural import counted

RECORD = "predictions.judge.jsonl"
# Models with published figures (see the tasks' headlines), and their sources.
SOURCES = {
    "LLaVA-MoD-2B": "LLaVA-MoD, arXiv 2408.15881",
    "LLaVA-MoD-1.8B": "as quoted by LLaVA-KD, arXiv 2410.16236",
    "LLaVA-MoD-0.5B": "as quoted by LLaVA-KD, arXiv 2410.16236",
    "LLaVA-1.5-13B": "LLaVA's MODEL_ZOO",
}


@dataclass(frozen=True)
class Published:
    """A model's published figures by `Headline.key`."""

    model: str
    source: str
    figures: dict[str, float]


@dataclass(frozen=True)
class ScoredRun:
    """A model's scores by task; `unscored` says why a task has none."""

    name: str
    scores: dict[str, TaskScore]
    unscored: dict[str, str] = field(default_factory=dict)

    def figure(self, headline: Headline) -> float | None:
        """The run's figure of a headline, or None."""
        score = self.scores.get(headline.task)
        return None if score is None else score.metrics.get(headline.metric)


def load_run(
    path: Path, root: Path, name: str, *, judge_model: str = "", judge_template: Path | None = None
) -> ScoredRun:
    """Score every `TASK/predictions.jsonl` of an output folder of `generate`.

    Tasks that a judge has rated are scored from its recorded replies beside the predictions; `judge_model` chooses one
    of several judges, `judge_template` is the wording that they were asked with, if it is not the default. What cannot
    be scored is listed with the reason. Errors: `EvalError` for a folder without predictions.
    """
    found = {task: path / task / "predictions.jsonl" for task in TASKS}
    found = {task: file for task, file in found.items() if file.is_file()}
    if not found:
        raise EvalError(f"{path}: has no TASK/predictions.jsonl: name an output folder of 'eval-student generate'")
    scores, unscored = {}, {}
    for task, file in found.items():
        record = file.parent / RECORD
        judged = TASKS[task].judging is not None and record.is_file()
        if not judged and TASKS[task].score is None:
            unscored[task] = f"no {RECORD}: score it with --judge first"
            continue
        try:
            judge = RecordedJudge(record, judge_model) if judged else None
            scores[task] = score_task(task, root, file, judge=judge, judge_template=judge_template if judged else None)
        except (ConfigError, EvalError) as error:
            unscored[task] = str(error)
    return ScoredRun(name, scores, unscored)


def run_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to make them distinct."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError("report: a run is named twice: remove one")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError


def headlines(runs: Sequence[ScoredRun]) -> list[Headline]:
    """The headlines of all tasks that any run has a score for."""
    scored = [task for name, task in TASKS.items() if any(name in run.scores for run in runs)]
    return [headline for task in scored for headline in task.headlines]


def references(columns: Sequence[Headline]) -> list[Published]:
    """The published models that have a figure in any column."""
    found = []
    for model, source in SOURCES.items():
        figures = {column.key: column.published[model] for column in columns if model in column.published}
        found += [Published(model, source, figures)] if figures else []
    return found


def incomparable(column: Headline, runs: Sequence[ScoredRun]) -> str | None:
    """Why published figures of a headline are not comparable with the runs'; None if they are."""
    if column.not_comparable:
        return column.not_comparable
    measured = {run.scores[column.task].n for run in runs if column.task in run.scores}
    official = get_task(column.task).official_n
    if measured - set(official):
        asked, here = " or ".join(map(str, official)), " and ".join(map(str, sorted(measured)))
        return f"published on {asked} questions, measured here on {here}"
    return None


def comparable(column: Headline, run: ScoredRun, base: ScoredRun) -> bool:
    """Whether two runs' figures of a headline were measured alike; True if either is missing."""
    return len(_measured(column, [run, base])) < 2


def _measured(column: Headline, runs: Sequence[ScoredRun]) -> dict[tuple[object, ...], ScoredRun]:
    """The first run of each way in which a headline was measured: on which questions, and by which judge."""
    scored = [(run.scores[column.task], run) for run in runs if column.task in run.scores]
    return {(score.n, score.data_sha256, score.judge): run for score, run in reversed(scored)}


def difference(column: Headline, value: float | None, base: float | None) -> str:
    """A figure's difference from the first run's, formatted; empty if either is missing."""
    if value is None or base is None:
        return ""
    sign = "+" if value >= base else "−"
    return f"{sign}{column.shown(abs(value - base))}"


def footnotes(runs: Sequence[ScoredRun], columns: Sequence[Headline]) -> list[str]:
    """The sources of the published figures, and why some of them (†) or of the runs' (‡) are not comparable."""
    shown = references(columns)
    notes = [f"{published.model}: {published.source}" for published in shown]
    for column in columns:
        why = incomparable(column, runs)
        if why and any(column.key in published.figures for published in shown):
            notes.append(f"† {column.title}: {why}; not comparable")
        ways = _measured(column, runs)
        if len(ways) > 1:
            each = "; ".join(f"{run.name}: {_way(run.scores[column.task])}" for run in reversed(ways.values()))
            notes.append(f"‡ {column.title}: not all runs are measured alike ({each}); not comparable")
    return notes


def _way(score: TaskScore) -> str:
    judge = f", judged by {score.judge}" if score.judge else ""
    return f"{counted(score.n, 'question')}{judge}, data sha256 {score.data_sha256[:8]}…"
