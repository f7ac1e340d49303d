"""Scoring a predictions file against a benchmark. Imports no torch."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.example import Example, Scored, Verdict
from eval.files import data_checksum, read_object
from eval.join import join
from eval.judge_template import JudgeTemplate
from eval.predictions import Prediction, read_predictions
from eval.task import Task
from eval.tasks import TASKS, get_task
from eval.unanswerable import read_unanswerable
from llavamod_offline.errors import ConfigError, EvalError
from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from eval.judge import Judge

SIDECAR_SUFFIX = ".protocol.json"


@dataclass(frozen=True)
class TaskScore:
    """A task's score and how it was obtained; `texts` and `verdicts` are by example id.

    `limit`: how many questions, from the first, were asked (None: all). `n_unanswerable`: questions whose image could
    not be read; like the `n_missing`, they count as wrong. `judge`: who judged, and in what wording; empty without one.
    """

    task: str
    metrics: dict[str, float | None]
    n: int
    limit: int | None
    n_missing: int
    n_unanswerable: int
    n_unparsed: int
    protocol: str
    judge: str
    data_sha256: str
    texts: dict[str, str | None]
    verdicts: dict[str, Verdict]

    def as_json(self) -> dict[str, Any]:
        """The object that `eval-student score` writes and `--json` prints."""
        counts = ("n", "limit", "n_missing", "n_unanswerable", "n_unparsed")
        figures = {name: getattr(self, name) for name in (*counts, "protocol", "data_sha256")}
        headlines = [headline.metric for headline in get_task(self.task).headlines]
        return {"task": self.task, "headlines": headlines, "metrics": self.metrics, **figures}

    @property
    def counts(self) -> str:
        """The numbers of questions, in words."""
        limit = "" if self.limit is None else f" (limit {self.limit})"
        unanswerable = f", unanswerable {self.n_unanswerable}" if self.n_unanswerable else ""
        return f"n {self.n}{limit}, missing {self.n_missing}{unanswerable}, unparsed {self.n_unparsed}"


def score_task(
    name: str,
    root: Path,
    predictions: Path,
    *,
    allow_missing: bool = False,
    judge: Judge | None = None,
    judge_record: Path | None = None,
    judge_template: Path | None = None,
) -> TaskScore:
    """Score `predictions` on the benchmark `name`, whose files are below `root`.

    The denominator is the benchmark's question file, or its first questions if answers were generated with a `limit`.
    With `allow_missing`, missing predictions count as wrong; questions recorded as unanswerable always do.
    A `judge`'s replies are recorded in `judge_record`, by default beside the predictions.
    Errors: `EvalError` for unreadable files, for unknown, duplicate or missing ids, for a missing or failing judge;
    `ConfigError` for the task, a judge that it does not take, or a template without a required slot.
    """
    task = get_task(name)
    with _collector_paused():
        examples, limit = asked_examples(task, root, predictions)
        unanswerable = read_unanswerable(predictions)
        joined = join(
            examples,
            read_predictions(predictions, name),
            question_key=task.question_key,
            path=predictions,
            allow_missing=allow_missing,
            unanswerable=unanswerable,
        )
        texts = {example.id: joined[example.id].text if example.id in joined else None for example in examples}
        if judge is None:
            if task.score is None:
                raise EvalError(f"{name}: needs a judge: pass --judge URL, a model's folder, or recorded replies")
            scored, protocol, judged = task.score(examples, texts), task.protocol, ""
    if judge is not None:
        record = judge_record or predictions.with_suffix(".judge.jsonl")
        scored, protocol, judged = _score_judged(task, examples, texts, judge, record, judge_template)
    without = [example.id for example in examples if example.id not in joined]
    lost = sum(identifier in unanswerable for identifier in without)
    return TaskScore(
        task=name,
        metrics=scored.metrics,
        n=len(examples),
        limit=limit,
        n_missing=len(without) - lost,
        n_unanswerable=lost,
        n_unparsed=scored.n_unparsed,
        protocol=_protocol(task, protocol, examples, joined, scored, predictions, limit=limit, unanswerable=lost),
        judge=judged,
        data_sha256=data_checksum(root, task.reference_files(root)),
        texts=texts,
        verdicts=scored.verdicts,
    )


def asked_examples(task: Task, root: Path, predictions: Path) -> tuple[list[Example[Any]], int | None]:
    """The questions that a predictions file answers, and the `limit` it was generated with (None: all questions)."""
    examples = task.load(root)
    if not examples:
        raise EvalError(f"{root}: the question file of '{task.name}' is empty")
    file = sidecar(predictions)
    limit = read_object(file).get("limit") if file.is_file() else None
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise EvalError(f"{file}: 'limit' must be a whole number of at least 1: restore the file or generate again")
    return task.first(examples, limit), limit


def _score_judged(
    task: Task,
    examples: Sequence[Example[Any]],
    texts: Mapping[str, str | None],
    judge: Judge,
    record: Path,
    template_file: Path | None,
) -> tuple[Scored, str, str]:
    """Score a task with a judge; returns the score, the protocol, and who judged in what wording."""
    from eval.judge import ask

    judging = task.judging
    if judging is None:
        takers = " and ".join(name for name, known in TASKS.items() if known.judging)
        raise ConfigError(f"task '{task.name}' takes no judge: remove --judge (only {takers} take one)")
    template = JudgeTemplate.read(template_file, judging.template.slots) if template_file else judging.template
    questions = {}
    for example in examples:
        text = texts[example.id]
        values = None if text is None else judging.slots(example, text)
        if values is not None:
            questions[example.id] = template.fill(values)
    scored = judging.score(examples, texts, ask(judge, questions, record))
    judged = f"{judge.model} at temperature 0, template {template.name} (sha256 {template.sha256})"
    protocol = judging.protocol.replace("JUDGE", judge.model)
    return scored, f"{protocol} | judge: {judged}", judged


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would otherwise traverse all questions repeatedly while loading."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.freeze()
            gc.unfreeze()  # counts new objects as old, so they are not traversed at once
            gc.enable()


def sidecar(predictions: Path) -> Path:
    """The file with the settings that a predictions file was generated with."""
    return predictions.with_name(predictions.name.removesuffix(".jsonl") + SIDECAR_SUFFIX)


def _protocol(
    task: Task,
    protocol: str,
    examples: Sequence[Example[Any]],
    joined: Mapping[str, Prediction],
    scored: Scored,
    predictions: Path,
    *,
    limit: int | None,
    unanswerable: int,
) -> str:
    first = "" if limit is None else f", the first ones (limit {limit})"
    parts = [f"{task.name}: {counted(len(examples), 'question')}{first}"]
    if len(examples) not in task.official_n:
        parts.append(f"not the published set of {' or '.join(map(str, task.official_n))}")
    parts.append(protocol)
    prompts = [(example, joined[example.id].prompt) for example in examples if example.id in joined]
    unknown = sum(not prompt for _, prompt in prompts)
    if unknown:
        parts.append(f"{unknown} prompts are not recorded")
    reworded = sum(bool(prompt) and _reworded(example, prompt) for example, prompt in prompts)
    if reworded:
        parts.append(f"{reworded} prompts are worded unlike the published ones")
    if len(examples) - len(joined) > unanswerable:
        parts.append(f"{len(examples) - len(joined) - unanswerable} missing answers counted as wrong")
    if unanswerable:
        parts.append(f"{unanswerable} unanswerable questions (image not readable) counted as wrong")
    parts += scored.notes
    parts.append(f"generation: {_generation(predictions)}")
    return " | ".join(parts)


def _generation(predictions: Path) -> str:
    """The generation settings, from the file beside our predictions."""
    file = sidecar(predictions)
    if not file.is_file():
        return "not recorded"
    settings = read_object(file)
    shown = {name: value for name, value in settings.items() if name not in ("task", "prompt")}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in shown.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _reworded(example: Example[Any], prompt: str) -> bool:
    """Whether a prompt is neither the published one nor its question alone, as LLaVA records for MMBench."""
    if prompt in (example.prompt, example.question):
        return False
    return _plain(prompt) not in (_plain(example.prompt), _plain(example.question))


def _plain(prompt: str) -> str:
    return " ".join(prompt.replace("<image>", " ").split())
