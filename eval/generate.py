"""Answering a benchmark's questions with a model, resumably: `OUTPUT/TASK/predictions.jsonl`.

Beside the predictions lies `predictions.protocol.json`, the settings that decide the answers. A run that is started
again with the same settings skips what is answered; with others it is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.engines.protocol import Answer, AnswerEngine
from eval.example import Example, Task
from eval.export import UPLOADS, write_answers
from eval.files import FileImage, read_object
from eval.predictions import Prediction, prediction_line, read_predictions
from eval.score import sidecar
from eval.tasks import get_task
from llavamod_offline.errors import ConfigError, EvalError
from llavamod_offline.storage.atomic import write_file

log = logging.getLogger(__name__)

ENGINES = ("hf", "vllm", "processor")


@dataclass(frozen=True)
class EvalGenerateConfig:
    """What `eval-student generate` takes. `model` and `root` are folders; `tasks` names benchmarks.

    `engine` hf: a LLaVA student, with this project's `template` and `image_aspect`, which must be those of training;
    vllm: the same in vLLM, which wants a larger `batch_size`;
    processor: any image-text-to-text checkpoint, with its own chat template and image processor.
    `max_new_tokens` None: each benchmark's published limit.
    `limit` answers the first so many questions only, for a try: their score needs all.
    """

    model: str = "???"
    root: str = "???"
    output: str = "???"
    tasks: list[str] = field(default_factory=list)
    engine: str = "hf"
    template: str = "qwen"
    image_aspect: str = "pad"
    batch_size: int = 8
    max_new_tokens: int | None = None
    limit: int | None = None
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine '{self.engine}' is unknown: choose one of {', '.join(ENGINES)}")
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, is {value}")
        if not self.tasks:
            raise ConfigError("tasks: name at least one benchmark, such as tasks=[pope]")
        for task in self.tasks:
            get_task(task)


def generate(config: EvalGenerateConfig, engine: AnswerEngine | None = None) -> dict[str, Path]:
    """Answer the questions of every benchmark in `config.tasks` → the predictions file of each.

    Errors: `EvalError` for unreadable benchmark files, missing images, or an output folder of other settings;
    `ModelError` and `ConfigError` for the model and the settings.
    """
    root = Path(config.root)
    examples = {name: _examples(get_task(name), root, config.limit) for name in config.tasks}
    engine = engine or _engine(config)
    paths = {}
    for name, asked in examples.items():
        task = get_task(name)
        path = Path(config.output) / name / "predictions.jsonl"
        tokens = config.max_new_tokens or task.MAX_NEW_TOKENS
        _agree_on_settings(path, _settings(config, task, engine, tokens, asked))
        _answer_all(engine, name, asked, path, config.batch_size, tokens)
        if config.limit is None:
            _export(name, asked, path, Path(config.model).name)
        paths[name] = path
    return paths


def _examples(task: Task, root: Path, limit: int | None) -> list[Example[Any]]:
    """Load a benchmark's questions and make sure that the images are there before a model is loaded."""
    examples = task.load(root)[:limit]
    if not examples:
        raise EvalError(f"{root}: the question file of '{task.NAME}' is empty")
    sources = [example.source.path for example in examples if isinstance(example.source, FileImage)]
    missing = [path for path in dict.fromkeys(sources) if not path.is_file()]
    if missing:
        raise EvalError(f"{missing[0]}: no such picture ({len(missing)} of '{task.NAME}' are missing): put them there")
    return examples


def _engine(config: EvalGenerateConfig) -> AnswerEngine:
    if config.engine == "processor":
        from eval.engines.processor import ProcessorEngine

        return ProcessorEngine(Path(config.model), dtype=config.dtype, device=config.device)
    settings: dict[str, Any] = {
        "template": config.template,
        "image_aspect": config.image_aspect,
        "dtype": config.dtype,
        "device": config.device,
    }
    if config.engine == "vllm":
        from eval.engines.llava_vllm import LlavaVllmEngine

        return LlavaVllmEngine(Path(config.model), **settings)
    from eval.engines.llava_hf import LlavaHfEngine

    return LlavaHfEngine(Path(config.model), **settings)


def _settings(
    config: EvalGenerateConfig, task: Task, engine: AnswerEngine, max_new_tokens: int, examples: Sequence[Example[Any]]
) -> dict[str, Any]:
    questions = hashlib.sha256()
    for example in examples:
        questions.update(json.dumps([example.id, example.prompt, example.image]).encode())
    settings = {"task": task.NAME, **engine.describe(), "max_new_tokens": max_new_tokens}
    settings["questions_sha256"] = questions.hexdigest()
    if config.limit is not None:
        settings["limit"] = config.limit
    return settings


def _agree_on_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside a new predictions file, or compare them with those of one begun before."""
    file = sidecar(path)
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    if not file.is_file():
        raise EvalError(f"{path}: was not begun by this command ({file.name} is missing): choose another output")
    before = read_object(file)
    for name in sorted(settings.keys() | before.keys()):
        if settings.get(name) != before.get(name):
            raise EvalError(
                f"{path}: was generated with {name} {json.dumps(before.get(name))}, "
                f"not {json.dumps(settings.get(name))}: choose another output or remove the file"
            )


def _answer_all(
    engine: AnswerEngine, name: str, examples: Sequence[Example[Any]], path: Path, batch_size: int, max_new_tokens: int
) -> None:
    """Answer what is not answered yet, appending to the file batch by batch."""
    done = _finished(path, name)
    waiting = [example for example in examples if example.id not in done]
    started, tokens = time.monotonic(), 0
    if done:
        log.info("%s: %d of %d questions are answered already", name, len(done), len(examples))
    with path.open("ab") as stream, tqdm(total=len(waiting), desc=name, disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(waiting, batch_size):
            answers = engine.answer(batch, max_new_tokens)
            for example, answer in zip(batch, answers, strict=True):
                tokens += answer.n_tokens
                stream.write(prediction_line(_prediction(name, example, answer)))
            stream.flush()
            bar.update(len(batch))
    seconds = max(time.monotonic() - started, 1e-9)
    log.info("%s: %d answers in %.1f s (%.1f tokens/s) → %s", name, len(waiting), seconds, tokens / seconds, path)


def _export(task: str, examples: Sequence[Example[Any]], path: Path, model: str) -> None:
    """Write the answers in the forms that LLaVA's scripts and the benchmark's own server or script take."""
    texts = {prediction.name: prediction.text for prediction in read_predictions(path, task)}
    write_answers(task, examples, texts, path.with_name("answers.jsonl"), model=model)
    if task in UPLOADS:
        write_answers(task, examples, texts, path.with_name(f"upload{UPLOADS[task]}"), model=model)


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
    """The ids that are answered; a last line that a kill cut short is taken off."""
    if not path.exists():
        return set()
    with path.open("r+b") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.info("%s: the last line was cut short and is taken off", path)
            stream.truncate(whole)
    return {prediction.name for prediction in read_predictions(path, task)}


def _batches(examples: Sequence[Example[Any]], size: int) -> Iterator[Sequence[Example[Any]]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
