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
from llavamod_offline.errors import ConfigError, EvalError

if TYPE_CHECKING:
    from eval.judge import Judge

SIDECAR_SUFFIX = ".protocol.json"


@dataclass(frozen=True)
class TaskScore:
    """A task's score and how it was obtained; `texts` and `verdicts` are by example id."""

    task: str
    metrics: dict[str, float | None]
    n: int
    n_missing: int
    n_unparsed: int
    protocol: str
    data_sha256: str
    texts: dict[str, str | None]
    verdicts: dict[str, Verdict]

    def as_json(self) -> dict[str, Any]:
        """The object that `eval-student score --json` writes."""
        names = ("task", "metrics", "n", "n_missing", "n_unparsed", "protocol", "data_sha256")
        return {name: getattr(self, name) for name in names}


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

    The denominator is the benchmark's question file. With `allow_missing`, missing predictions count as wrong.
    A `judge`'s replies are recorded in `judge_record`, by default beside the predictions.
    Errors: `EvalError` for unreadable files, for unknown, duplicate or missing ids, for a missing or failing judge;
    `ConfigError` for the task, a judge that it does not take, or a template without a required slot.
    """
    task = get_task(name)
    with _collector_paused():
        examples = task.load(root)
        if not examples:
            raise EvalError(f"{root}: the question file of '{name}' is empty")
        answers = read_predictions(predictions, name)
        joined = join(examples, answers, question_key=task.question_key, path=predictions, allow_missing=allow_missing)
        texts = {example.id: joined[example.id].text if example.id in joined else None for example in examples}
        if judge is None:
            if task.score is None:
                raise EvalError(f"{name}: needs a judge: pass --judge URL, a model's folder, or recorded replies")
            scored, protocol = task.score(examples, texts), task.protocol
    if judge is not None:
        record = judge_record or predictions.with_suffix(".judge.jsonl")
        scored, protocol = _score_judged(task, examples, texts, judge, record, judge_template)
    return TaskScore(
        task=name,
        metrics=scored.metrics,
        n=len(examples),
        n_missing=len(examples) - len(joined),
        n_unparsed=scored.n_unparsed,
        protocol=_protocol(task, protocol, examples, joined, scored, predictions),
        data_sha256=data_checksum(root, task.reference_files(root)),
        texts=texts,
        verdicts=scored.verdicts,
    )


def _score_judged(
    task: Task,
    examples: Sequence[Example[Any]],
    texts: Mapping[str, str | None],
    judge: Judge,
    record: Path,
    template_file: Path | None,
) -> tuple[Scored, str]:
    """Score a task with a judge → the score, and the protocol."""
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
    wording = f"template {template.name} (sha256 {template.sha256})"
    protocol = judging.protocol.replace("JUDGE", judge.model)
    return scored, f"{protocol} | judge: {judge.model} at temperature 0, {wording}"


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
) -> str:
    parts = [f"{task.name}: {len(examples)} questions"]
    if len(examples) not in task.official_n:
        parts.append(f"not the published set of {' or '.join(map(str, task.official_n))}")
    parts.append(protocol)
    reworded = sum(e.id in joined and _reworded(e, joined[e.id].prompt) for e in examples)
    if reworded:
        parts.append(f"{reworded} prompts are worded unlike the published ones")
    if len(joined) < len(examples):
        parts.append(f"{len(examples) - len(joined)} missing answers counted as wrong")
    parts += scored.notes
    parts.append(f"generation: {_generation(predictions)}")
    return " | ".join(parts)


def _generation(predictions: Path) -> str:
    """The settings of the generation, from the file beside our predictions."""
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
