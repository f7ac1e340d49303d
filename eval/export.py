"""Predictions in the forms that other tools take.

.jsonl  LLaVA-1.5's answers (question_id, prompt, text), for its own scripts; every benchmark
.xlsx   MMBench's upload: the TSV without its images and categories, with a column `prediction`
.json   VizWiz's upload [{image, answer}] with normalised answers; GQA's [{questionId, prediction}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.example import Example
from eval.files import EmbeddedImage, read_tsv
from eval.join import join
from eval.predictions import llava_answer_line, read_predictions
from eval.scorers.vqa_accuracy import normalise
from eval.tasks import get_task, gqa
from eval.xlsx import spreadsheet
from llavamod_offline.errors import ConfigError, EvalError
from llavamod_offline.storage.atomic import write_file

# The form that a benchmark's server or own script takes, beside LLaVA's answers.
UPLOADS = {"mmbench": ".xlsx", "mmbench_cn": ".xlsx", "vizwiz": ".json", "gqa": ".json"}
_MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_MMBENCH_PREDICTION = 6  # where the official converter puts the column


def export(task: str, root: Path, predictions: Path, output: Path, *, model: str = "") -> None:
    """Write a predictions file in the form that `output`'s ending names.

    Errors: `EvalError` for missing, unknown or duplicate ids; `ConfigError` for a form that the benchmark lacks.
    """
    module = get_task(task)
    allowed = (".jsonl", *([UPLOADS[task]] if task in UPLOADS else []))
    if output.suffix not in allowed:
        raise ConfigError(f"{output}: answers of '{task}' are written as {' or '.join(allowed)}")
    examples = module.load(root)
    answers = read_predictions(predictions, task)
    joined = join(examples, answers, question_key=module.question_key, path=predictions)
    texts = {name: prediction.text for name, prediction in joined.items()}
    write_answers(task, examples, texts, output, model=model)


def write_answers(
    task: str, examples: Sequence[Example[Any]], texts: Mapping[str, str], output: Path, *, model: str
) -> None:
    """Write texts by example id in the form that `output`'s ending names."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        lines = (llava_answer_line(_question_id(e), _llava_prompt(task, e), texts[e.id], model) for e in examples)
        write_file(output, b"".join(lines))
    elif output.suffix == ".xlsx":
        write_file(output, _mmbench(examples, texts))
    elif task == "vizwiz":
        rows = [{"image": example.image, "answer": normalise(texts[example.id])} for example in examples]
        write_file(output, json.dumps(rows, ensure_ascii=False))
    else:
        answers = [{"questionId": example.id, "prediction": gqa.parse(texts[example.id])} for example in examples]
        write_file(output, json.dumps(answers, ensure_ascii=False))


def _question_id(example: Example[Any]) -> str | int:
    return example.id if example.question_id is None else example.question_id


def _llava_prompt(task: str, example: Example[Any]) -> str:
    """The prompt as LLaVA's runners record it; their ScienceQA script tells pictured questions by `<image>` in it."""
    if task.startswith("mmbench"):
        return example.question
    return f"<image>\n{example.prompt}" if task == "scienceqa" and example.source is not None else example.prompt


def _mmbench(examples: Sequence[Example[Any]], texts: Mapping[str, str]) -> bytes:
    source = examples[0].source
    assert isinstance(source, EmbeddedImage)
    path = source.path
    columns, rows = read_tsv(path, drop=_MMBENCH_DROPPED)
    kept = [column for column in columns if column not in _MMBENCH_DROPPED]
    table: list[list[str | int | None]] = [[*kept[:_MMBENCH_PREDICTION], "prediction", *kept[_MMBENCH_PREDICTION:]]]
    for row in rows:
        cells: list[str | int | None] = [row.text(column) or None for column in kept]
        cells[kept.index("index")] = int(row.text("index"))
        table.append([*cells[:_MMBENCH_PREDICTION], texts[row.text("index")], *cells[_MMBENCH_PREDICTION:]])
    try:
        return spreadsheet(table)
    except ValueError as error:
        raise EvalError(f"{path}: the upload cannot be written: {error}") from error
