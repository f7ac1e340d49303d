"""Writing predictions for other tools: LLaVA-1.5's answers (.jsonl), and the upload of a task that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.example import Example
from eval.join import join
from eval.predictions import llava_answer_line, read_predictions, refuse_own_input
from eval.score import asked_examples
from eval.task import Task
from eval.tasks import get_task
from eval.unanswerable import read_unanswerable
from llavamod_offline.errors import ConfigError
from llavamod_offline.plural import counted
from llavamod_offline.storage.atomic import write_file


def export(name: str, root: Path, predictions: Path, output: Path, *, model: str = "") -> None:
    """Write the predictions of a task in the format that `output`'s suffix names.

    Unanswerable questions get an empty answer.
    Errors: `EvalError` for missing, unknown or duplicate ids; `ConfigError` for a format that the task lacks, and
    for an upload of some of the questions, and for an output that is the predictions file.
    """
    task = get_task(name)
    refuse_own_input(output, predictions)
    allowed = (".jsonl", *([task.upload.suffix] if task.upload else []))
    if output.suffix not in allowed:
        raise ConfigError(f"{output}: '{name}' can only be exported as {' or '.join(allowed)}: rename the output")
    examples, limit = asked_examples(task, root, predictions)
    if limit is not None and output.suffix != ".jsonl":
        raise ConfigError(
            f"{predictions}: answers the first {counted(limit, 'question')} only, and an upload needs all: generate "
            "without limit, or export as .jsonl"
        )
    unanswerable = read_unanswerable(predictions)
    answers = read_predictions(predictions, name)
    joined = join(examples, answers, question_key=task.question_key, path=predictions, unanswerable=unanswerable)
    texts = dict.fromkeys(unanswerable, "") | {name: found.text for name, found in joined.items()}
    write_answers(task, examples, texts, output, model=model)


def write_answers(
    task: Task, examples: Sequence[Example[Any]], texts: Mapping[str, str], output: Path, *, model: str
) -> None:
    """Write texts by example id in the format that `output`'s suffix names."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix != ".jsonl" and task.upload:
        task.upload.check()
        write_file(output, task.upload.content(examples, texts))
        return
    ids = [example.id if example.question_id is None else example.question_id for example in examples]
    lines = (llava_answer_line(i, task.llava_prompt(e), texts[e.id], model) for i, e in zip(ids, examples, strict=True))
    write_file(output, b"".join(lines))
