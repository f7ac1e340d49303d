"""Predictions: one JSON object per line, ours (`predictions.jsonl`) or another runner's; or a table.

Ours:        {"task", "id", "image", "prompt", "text", "n_tokens", "finish"}  (`finish`: "stop" or "length")
LLaVA:       {"question_id", "text", "prompt"}
lmms-eval:   {"doc": {"question_id" or "questionId" or "index" or "id", "question"}, "filtered_resps" or "resps"}
VLMEvalKit:  an .xlsx, .tsv or .csv with the columns `index`, `prediction` and `question`

Other fields are ignored. Without a prompt, LLaVA answers that share a `question_id` cannot be told apart. The last two
may number the questions in their own way, so their question must match the example's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.export.xlsx import read_spreadsheet
from eval.files import Row, read_table
from llavamod_offline.errors import ConfigError, EvalError

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 * 2**20
# First bytes of files in other containers or encodings, and what to do about them.
_WRAPPED = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or name it .xlsx",
    b"\xff\xfe": "is in UTF-16: save it as UTF-8",
    b"\xfe\xff": "is in UTF-16: save it as UTF-8",
}
FINISHES = ("stop", "length")
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_LMMS_EVAL_IDS = ("question_id", "questionId", "index", "id")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(slots=True)  # not frozen: creating hundreds of thousands would take three times as long
class Prediction:
    """One answer of a model. `id` is the example's id, or None if another runner's file has a `question_id` instead.

    `question`: the bare question, if the runner may number questions in its own way; it must match the example's.
    """

    text: str
    prompt: str
    id: str | None = None
    question_id: str | None = None
    task: str = ""
    image: str = ""
    n_tokens: int = 0
    finish: str = ""
    question: str = ""

    @property
    def name(self) -> str:
        """The name of this prediction in error messages."""
        return self.id if self.id is not None else str(self.question_id)


def read_predictions(path: Path, task: str) -> list[Prediction]:
    """Read a predictions file of any form; every line must be for `task`.

    A line that repeats one of our predictions is skipped, with a warning.
    Errors: `EvalError` naming file and line for bad JSON, a wrong type, a NUL byte, an overlong line, another task, two
    different predictions of ours for one question.
    """
    if not path.is_file():
        raise EvalError(f"{path}: no such predictions file: create one with 'eval-student generate'")
    if path.suffix.lower() in (".xlsx", *_DELIMITERS):
        return _table(path)
    found: list[Prediction] = []
    places: dict[str, tuple[int, Prediction]] = {}
    repeated = 0
    for number, line in _lines(path):
        prediction = _prediction(path, number, line, task)
        if prediction.id is not None:  # LLaVA's question_ids need not be unique
            first, same = places.setdefault(prediction.id, (number, prediction))
            if same is not prediction:
                if same != prediction:
                    raise EvalError(
                        f"{path}: lines {first} and {number} are different predictions for '{prediction.id}': remove "
                        "one of them, or the file to generate all again"
                    )
                repeated += 1
                continue
        found.append(prediction)
    if repeated:
        log.warning("%s: %d repeated line(s) left out", path, repeated)
    return found


def refuse_own_input(output: Path, predictions: Path) -> None:
    """Raise `ConfigError` if an output would replace the predictions that it is made from."""
    if output.resolve() == predictions.resolve():
        raise ConfigError(f"--output: {output} is the predictions file, which it would replace: name another file")


def prediction_line(prediction: Prediction) -> bytes:
    """Serialise a prediction as a line of `predictions.jsonl`."""
    fields = asdict(prediction)
    ordered = {name: fields[name] for name in ("task", "id", "image", "prompt", "text", "n_tokens", "finish")}
    return json.dumps(ordered, ensure_ascii=False).encode() + b"\n"


def llava_answer_line(question_id: str | int, prompt: str, text: str, model: str) -> bytes:
    """Serialise an answer as LLaVA-1.5's evaluation scripts write and read it."""
    answer: dict[str, Any] = {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "model_id": model,
        "metadata": {},
    }
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the non-blank lines with their numbers, reading no line beyond the limit."""
    with path.open("rb") as stream:
        number, start = 0, stream.read(4)
        for magic, problem in _WRAPPED.items():
            if start.startswith(magic):
                raise EvalError(f"{path}: {problem}")
        stream.seek(0)
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise EvalError(
                    f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes: remove it, no answer is that long"
                )
            if line.strip():
                yield number, line


def _table(path: Path) -> list[Prediction]:
    if path.suffix.lower() == ".xlsx":
        columns, *cells = read_spreadsheet(path) or [[]]
        filled = [dict(zip(columns, row + [""] * len(columns), strict=False)) for row in cells if any(row)]
        rows = [Row(path, f"row {number}", values) for number, values in enumerate(filled, 1)]
    else:
        names, rows = read_table(path, delimiter=_DELIMITERS[path.suffix.lower()])
        columns = list(names)
    absent = [name for name in ("index", "question", "prediction") if name not in columns]
    if absent:
        raise EvalError(f"{path}: no column '{absent[0]}': VLMEvalKit's tables have index, question and prediction")
    return [_numbered(row.text("prediction"), row.text("question"), row.text("index")) for row in rows]


def _numbered(text: str, question: str, identifier: str) -> Prediction:
    return Prediction(text, question, question_id=identifier, question=question)


def _prediction(path: Path, number: int, line: bytes, task: str) -> Prediction:
    where = f"{path}: line {number}"
    if b"\0" in line:
        raise EvalError(f"{where}: contains a NUL byte: the file is damaged, generate or copy it again")
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise EvalError(f"{where}: not UTF-8: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(row, dict):
        raise EvalError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if isinstance(row.get("doc"), dict) and "text" not in row:
        return _lmms_eval(row, where)
    text = _text(row, "text", where)
    if "question_id" in row and "task" not in row:
        prompt = _text(row, "prompt", where) if "prompt" in row else ""
        return Prediction(text, prompt, question_id=_identifier(row, "question_id", where))
    prompt = _text(row, "prompt", where)
    if "id" not in row:
        raise EvalError(f"{where}: has neither 'id' (our predictions) nor 'question_id' (LLaVA's answers)")
    found = _text(row, "task", where)
    if found != task:
        raise EvalError(f"{where}: is for task '{found}', not '{task}': use the predictions of that task")
    tokens, finish = row.get("n_tokens"), _text(row, "finish", where)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise EvalError(f"{where}: 'n_tokens' must be a whole number, found {_shown(tokens)}")
    if finish not in FINISHES:
        raise EvalError(f"{where}: 'finish' must be one of {', '.join(FINISHES)}, found {_shown(finish)}")
    identifier = _identifier(row, "id", where)
    return Prediction(text, prompt, identifier, None, found, _text(row, "image", where), tokens, finish)


def _lmms_eval(row: dict[str, Any], where: str) -> Prediction:
    """A line of lmms-eval's `--log_samples`: the question as its task's data set has it, and the filtered response."""
    doc = row["doc"]
    name = next((name for name in _LMMS_EVAL_IDS if name in doc), None)
    if name is None:
        raise EvalError(f"{where}: 'doc' has none of {', '.join(_LMMS_EVAL_IDS)}: answers cannot be matched")
    response = row.get("filtered_resps") or row.get("resps")
    while isinstance(response, list) and len(response) == 1:
        response = response[0]
    found = {"response": response} if response is not None else {}
    return _numbered(_text(found, "response", where), _text(doc, "question", where), _identifier(doc, name, where))


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = "is missing" if name not in row else f"must be a string, found {_shown(value)}"
        raise EvalError(f"{where}: '{name}' {found}")
    if "\0" in value:
        raise EvalError(f"{where}: '{name}' contains a NUL character: the file is damaged, generate or copy it again")
    if not value.isascii() and _SURROGATE.search(value):
        raise EvalError(f"{where}: '{name}' contains a lone surrogate: it is not valid text, generate it again")
    return value


def _identifier(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(row, name, where)


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "…"
