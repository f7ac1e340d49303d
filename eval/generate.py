"""Answering benchmarks' questions with a model, resumably: `OUTPUT/TASK/predictions.jsonl`.

`predictions.protocol.json` beside it records the settings that determine the answers. A rerun with the same settings
skips answered questions; a rerun with other settings is refused. Questions whose image cannot be read are listed in
`predictions.unanswerable.jsonl`; a rerun tries them again.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.engines import AnswerEngineName, open_engine
from eval.engines.protocol import Answer, AnswerEngine
from eval.example import Example
from eval.export.answers import write_answers
from eval.files import end_last_line, read_object
from eval.predictions import Prediction, prediction_line, read_predictions
from eval.score import sidecar
from eval.task import Task
from eval.tasks import TASKS, get_task
from eval.unanswerable import unanswerable_file, write_unanswerable
from llavamod_offline.config import InputPath, raise_problems
from llavamod_offline.data.encode.template import AUTO, OWN, TEMPLATES
from llavamod_offline.data.images import decode_image
from llavamod_offline.errors import DataError, EvalError
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.hub import checkpoint_folder, checkpoint_name
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.atomic import write_file
from llavamod_offline.storage.lock import locked

log = logging.getLogger(__name__)

MAX_MISSING = 0.5  # above this share of missing images, the folder is probably wrong


@dataclass(frozen=True)
class EvalGenerateConfig:
    """The model, the benchmarks that it answers, and how it is run."""

    model: InputPath = "???"
    """Folder or Hub id (org/name) of the model."""
    root: InputPath = "???"
    """Folder of the benchmarks' files, in LLaVA-1.5's layout (see eval/README.md)."""
    output: str = "???"
    """Folder for the answers, OUTPUT/TASK/predictions.jsonl; rerun the same command to resume."""
    tasks: list[str] = field(default_factory=list)
    """Benchmarks to answer, at least one, such as [pope, gqa]."""
    engine: AnswerEngineName = "hf"
    """What runs the model: hf (transformers) or vllm for the families in the README; processor for any other
    image-text-to-text checkpoint, with its own chat template and image processor."""
    template: str = "auto"
    """Prompt template that the student was trained with: auto (taken from its chat template, or from answers already in
    the output), qwen (LLaVA-MoD's own), chatml, llava_v1, or tokenizer (its chat template); not used by processor."""
    image_aspect: Literal["auto", "pad", "square"] = "auto"
    """How images were prepared in the student's training: pad (padded to squares) or square (resized and cropped);
    auto: as the model's folder states, else pad; not used by processor."""
    batch_size: int = 8
    """Questions per forward pass."""
    max_new_tokens: int | None = None
    """Maximum length of an answer in tokens; null: each benchmark's published limit."""
    limit: int | None = None
    """Answer, and later score, only the first N questions of each benchmark, with their rotations (MMBench) and pairs
    (MME); null: all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations; auto: float32 on a CPU, otherwise bfloat16."""
    device: str = "auto"
    """Where the model runs: auto (a GPU if there is one), cpu, cuda, or one GPU, such as cuda:1."""

    def __post_init__(self) -> None:
        raise_problems(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield one line for each problem, naming the key to change."""
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} is {value}: must be at least 1"
        if not self.tasks:
            yield f"tasks: name at least one benchmark, such as 'tasks=[pope]': {', '.join(TASKS)}"
        for task in self.tasks:
            if task not in TASKS:
                nearest = difflib.get_close_matches(task, TASKS, n=1)
                yield f"tasks: '{task}' is unknown: " + (
                    f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(TASKS)}"
                )


def generate(config: EvalGenerateConfig) -> dict[str, Path]:
    """Answer the questions of every benchmark in `config.tasks`; returns each one's predictions file.

    Errors: `ConfigError` if another process is answering one of them there; `EvalError` for unreadable benchmark files,
    missing images, or an output folder with other settings; `ModelError` and `ConfigError` for model and settings.
    """
    pick_device(config.device)
    with ExitStack() as stack:
        for name in dict.fromkeys(config.tasks):  # other tasks may be answered into the same output at the same time
            stack.enter_context(locked(Path(config.output) / name))
        return _generate(config)


def _generate(config: EvalGenerateConfig) -> dict[str, Path]:
    """Answer the questions; see `generate`."""
    root, model, limit = Path(config.root), checkpoint_folder(config.model), config.limit
    tasks = {name: get_task(name) for name in config.tasks}
    examples = {name: _examples(task, root, limit) for name, task in tasks.items()}
    for task in tasks.values():
        if limit is None and task.upload:
            task.upload.check()
    engine = open_engine(
        config.engine,
        model,
        template=_template(config),
        image_aspect=config.image_aspect,
        dtype=config.dtype,
        device=config.device,
    )
    paths = {name: Path(config.output) / name / "predictions.jsonl" for name in tasks}
    with keeping(lambda: _kept(paths.values(), config.output)):
        for name, task in tasks.items():
            path = paths[name]
            tokens = config.max_new_tokens or task.max_new_tokens
            _check_settings(path, _settings(name, engine, tokens, limit, examples[name]))
            unanswerable = _answer_all(engine, name, examples[name], path, config.batch_size, tokens)
            write_unanswerable(path, unanswerable)
            if unanswerable:
                log.warning(
                    "%s: %d of %d questions cannot be answered (they count as wrong), the first: %s; all are in %s: "
                    "repair their images and rerun the command",
                    *(name, len(unanswerable), len(examples[name]), next(iter(unanswerable.values()))),
                    unanswerable_file(path),
                )
            _export(task, examples[name], path, checkpoint_name(model), unanswerable, whole=limit is None)
    return paths


def _kept(paths: Iterable[Path], output: str) -> str:
    """Describe what a stopped run has kept, for its last line; empty if nothing."""
    answers = sum(path.read_bytes().count(b"\n") for path in paths if path.is_file())
    return f"{answers} answers are in {output}" if answers else ""


def _template(config: EvalGenerateConfig) -> str:
    """Return the template's name; `auto` continues with that of answers already in the output."""
    for name in config.tasks if config.template == AUTO else ():
        file = sidecar(Path(config.output) / name / "predictions.jsonl")
        before = read_object(file).get("template") if file.is_file() else None
        if before in (*TEMPLATES, OWN):
            return str(before)
    return config.template


def _examples(task: Task, root: Path, limit: int | None) -> list[Example[Any]]:
    """Load a benchmark's questions and check, before a model is loaded, that most of their images exist."""
    examples = task.first(task.load(root), limit)
    if not examples:
        raise EvalError(f"{root}: the question file of '{task.name}' is empty")
    sources = [example.source for example in examples if example.source is not None]
    missing = [source.name for source in sources if not source.exists]
    if len(missing) > MAX_MISSING * len(sources):
        raise EvalError(
            f"{missing[0]}: no such image ({len(missing)} of '{task.name}' are missing): put them there, "
            "or choose another root"
        )
    if missing:
        log.warning("%s: no such image (%d of '%s' are missing)", missing[0], len(missing), task.name)
    return examples


def _settings(
    task: str, engine: AnswerEngine, max_new_tokens: int, limit: int | None, examples: Sequence[Example[Any]]
) -> dict[str, Any]:
    questions = hashlib.sha256()
    for example in examples:
        questions.update(json.dumps([example.id, example.prompt, example.image]).encode())
    settings = {"task": task, **engine.describe(), "max_new_tokens": max_new_tokens}
    settings["questions_sha256"] = questions.hexdigest()
    if limit is not None:
        settings["limit"] = limit
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside a new predictions file, or compare them with those of an existing one."""
    file = sidecar(path)
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    if not file.is_file():
        raise EvalError(f"{path}: was not written by this command ({file.name} is missing): choose another output")
    before = read_object(file)
    names = settings.keys() | before.keys()
    if settings.get("model_sha256") == before.get("model_sha256"):
        names -= {"model"}  # the same model in a renamed folder
    found = [
        f"{name} {json.dumps(before.get(name))}, not {json.dumps(settings.get(name))}"
        for name in sorted(names)
        if settings.get(name) != before.get(name)
    ]
    if found:
        raise EvalError(f"{path}: was generated with {'; '.join(found)}: choose another output or remove the file")


def _answer_all(
    engine: AnswerEngine, name: str, examples: Sequence[Example[Any]], path: Path, batch_size: int, max_new_tokens: int
) -> dict[str, str]:
    """Answer the unanswered questions, appending to the file batch by batch; returns why some cannot be, by id."""
    done = _finished(path, name)
    waiting = [example for example in examples if example.id not in done]
    unanswerable: dict[str, str] = {}
    started, tokens = time.monotonic(), 0
    if done:
        log.info("%s: %d of %d questions are already answered", name, len(done), len(examples))
    bar = ProgressBar(name, len(examples), "question", done=len(examples) - len(waiting))
    with path.open("ab") as stream, bar:
        for batch in _batches(waiting, batch_size):
            answered, answers = _answer(engine, batch, max_new_tokens, unanswerable)
            for example, answer in zip(answered, answers, strict=True):
                tokens += answer.n_tokens
                stream.write(prediction_line(_prediction(name, example, answer)))
            stream.flush()
            bar.advance(len(batch))
    seconds, made = max(time.monotonic() - started, 1e-9), len(waiting) - len(unanswerable)
    log.info("%s: %d answers in %.1f s (%.1f tokens/s) → %s", name, made, seconds, tokens / seconds, path)
    return unanswerable


def _answer(
    engine: AnswerEngine, batch: Sequence[Example[Any]], max_new_tokens: int, unanswerable: dict[str, str]
) -> tuple[Sequence[Example[Any]], list[Answer]]:
    """Answer a batch without the questions whose image cannot be read, which are added to `unanswerable`."""
    try:
        return batch, engine.answer(batch, max_new_tokens)
    except (DataError, EvalError):
        found = {example.id: reason for example in batch if (reason := _unreadable(example))}
        if not found:  # something else is wrong
            raise
    unanswerable |= found
    others = [example for example in batch if example.id not in found]
    return others, engine.answer(others, max_new_tokens) if others else []


def _unreadable(example: Example[Any]) -> str:
    """Why the image of a question cannot be read; empty if it can."""
    try:
        if example.source is not None:
            decode_image(example.source.read(), name=example.source.name)
    except (DataError, EvalError) as error:
        return str(error)
    return ""


def _export(
    task: Task, examples: Sequence[Example[Any]], path: Path, model: str, unanswerable: Collection[str], *, whole: bool
) -> None:
    """Write the answers for LLaVA's scripts and, for a whole set, the task's upload; empty if unanswerable."""
    texts = dict.fromkeys(unanswerable, "")
    texts |= {prediction.name: prediction.text for prediction in read_predictions(path, task.name)}
    for name in ["answers.jsonl", *([f"upload{task.upload.suffix}"] if task.upload and whole else [])]:
        write_answers(task, examples, texts, path.with_name(name), model=model)


def _prediction(task: str, example: Example[Any], answer: Answer) -> Prediction:
    return Prediction(
        text=answer.text,
        prompt=example.prompt,
        id=example.id,
        task=task,
        image=example.image,
        n_tokens=answer.n_tokens,
        finish=answer.finish,
    )


def _finished(path: Path, task: str) -> set[str]:
    """Return the answered ids, removing repeated lines and an incomplete last line left by a killed run."""
    if not path.exists():
        return set()
    end_last_line(path)
    lines = path.read_bytes().count(b"\n")
    predictions = read_predictions(path, task)
    if len(predictions) < lines and all(prediction.id is not None for prediction in predictions):
        write_file(path, b"".join(map(prediction_line, predictions)))
    return {prediction.name for prediction in predictions}


def _batches(examples: Sequence[Example[Any]], size: int) -> Iterator[Sequence[Example[Any]]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
