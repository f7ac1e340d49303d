"""Scoring a predictions file against a benchmark. Imports no torch."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.example import Example, Scored, Verdict
from eval.files import data_checksum, read_object
from eval.join import join
from eval.predictions import Prediction, read_predictions
from eval.tasks import get_task
from llavamod_offline.errors import EvalError

if TYPE_CHECKING:
    from eval.judge import Judge

SIDECAR_SUFFIX = ".protocol.json"


@dataclass(frozen=True)
class TaskScore:
    """A task's score with everything that a reader needs to trust it; `texts` and `verdicts` are by example id."""

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
    task: str,
    root: Path,
    predictions: Path,
    *,
    allow_missing: bool = False,
    judge: Judge | None = None,
    judge_record: Path | None = None,
    judge_template: Path | None = None,
) -> TaskScore:
    """Score `predictions` on the benchmark `task` whose files lie below `root`.

    The denominator is the benchmark's question file. With `allow_missing`, questions without a prediction are wrong.
    A `judge`'s replies are recorded in `judge_record`, by default beside the predictions.
    Errors: `EvalError` for unreadable files, and for unknown, duplicate or missing ids; `ConfigError` for the task.
    """
    module = get_task(task)
    with _collector_paused():
        examples = module.load(root)
        if not examples:
            raise EvalError(f"{root}: the question file of '{task}' is empty")
        answers = read_predictions(predictions, task)
        joined = join(
            examples, answers, question_key=module.question_key, path=predictions, allow_missing=allow_missing
        )
        texts = {example.id: joined[example.id].text if example.id in joined else None for example in examples}
        if judge is None:
            scored, judged = module.score(examples, texts), ""
    if judge is not None:
        from eval.judged import score_with_judge

        record = judge_record or predictions.with_suffix(".judge.jsonl")
        scored, judged = score_with_judge(task, examples, texts, judge, record=record, template_file=judge_template)
    missing = len(examples) - len(joined)
    return TaskScore(
        task=task,
        metrics=scored.metrics,
        n=len(examples),
        n_missing=missing,
        n_unparsed=scored.n_unparsed,
        protocol=_protocol(task, examples, joined, scored, predictions, judged),
        data_sha256=data_checksum(root, module.reference_files(root)),
        texts=texts,
        verdicts=scored.verdicts,
    )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector, which else walks over all questions again and again while they are read."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.freeze()
            gc.unfreeze()  # what was made meanwhile counts as old, so that it is not walked over at once
            gc.enable()


def sidecar(predictions: Path) -> Path:
    """Where the settings that a predictions file was generated with are kept."""
    return predictions.with_name(predictions.name.removesuffix(".jsonl") + SIDECAR_SUFFIX)


def _protocol(
    task: str,
    examples: list[Example[Any]],
    joined: Mapping[str, Prediction],
    scored: Scored,
    predictions: Path,
    judged: str,
) -> str:
    module = get_task(task)
    parts = [f"{task}: {len(examples)} questions"]
    if len(examples) not in module.OFFICIAL_N:
        parts.append(f"not the published set of {' or '.join(map(str, module.OFFICIAL_N))}")
    parts.append(module.PROTOCOL if not judged or task == "mmhal" else module.PROTOCOL.split(" | ")[0])
    parts += [judged] if judged else []
    reworded = sum(e.id in joined and _reworded(e, joined[e.id].prompt) for e in examples)
    if reworded:
        parts.append(f"{reworded} prompts are worded unlike the published ones")
    if len(joined) < len(examples):
        parts.append(f"{len(examples) - len(joined)} missing answers counted as wrong")
    parts += scored.notes
    parts.append(f"generation: {_generation(predictions)}")
    return " | ".join(parts)


def _generation(predictions: Path) -> str:
    """The settings of the generation, from the file that lies beside our predictions."""
    file = sidecar(predictions)
    if not file.is_file():
        return "not recorded"
    settings = read_object(file)
    shown = {name: value for name, value in settings.items() if name not in ("task", "prompt")}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in shown.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _reworded(example: Example[Any], prompt: str) -> bool:
    """Whether a prompt is neither the published one nor, as LLaVA records it for MMBench, its question alone."""
    if prompt in (example.prompt, example.question):
        return False
    return _plain(prompt) not in (_plain(example.prompt), _plain(example.question))


def _plain(prompt: str) -> str:
    return " ".join(prompt.replace("<image>", " ").split())
