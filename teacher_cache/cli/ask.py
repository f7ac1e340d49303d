"""`llavamod-offline ask` on the command line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from teacher_cache.ask.compare import AnswerComparison


def ask(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A student's or teacher's folder, or a Hub id.")],
    words: Annotated[
        list[str], typer.Argument(metavar='[IMAGE]... "QUESTION"', help="Images, if any, then the question.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Limit on the answer's tokens.")] = 256,
    template: Annotated[
        str, typer.Option(metavar="NAME", help="Wording of the prompt; auto: what the checkpoint was trained with.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, cuda:1.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto (float32 on a CPU, else bfloat16), float32, bfloat16, float16.")
    ] = "auto",
    cache: Annotated[
        str | None, typer.Option(metavar="CACHE", help="Also show what a cached teacher says, with --key.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The cached sample that has this question and these images.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")] = False,
) -> None:
    """Ask a model a question about images, and print its answer as it is written.

    Prompt, images and greedy decoding are those of `eval-student generate`. MODEL may be any student, or any teacher
    that `cache-teacher` can run; as a Hub id, its local snapshot. With --cache and --key, the answer that the cache
    holds for that sample follows, token by token: how likely the teacher and the model find each token, and which
    token each prefers.

    \b
    Examples:
      llavamod-offline ask runs/mimic_dense/student photo.jpg "What is on the table?"
      llavamod-offline ask Qwen/Qwen2-VL-2B-Instruct before.png after.png "What has changed?" --max-new-tokens 64
      llavamod-offline ask runs/mimic_dense/student "Name three colours."
      llavamod-offline ask runs/mimic_dense/student photo.jpg "What is on the table?" \\
        --cache caches/general --key scene-000012
    """
    from llavamod_offline.errors import ConfigError

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is '{dtype}': must be auto, float32, bfloat16 or float16")
    if (cache is None) != (key is None):
        given, other = ("--key", "--cache") if cache is None else ("--cache", "--key")
        raise ConfigError(f"{given} needs {other}: name both, or neither; `cache-teacher report` shows a cache's keys")
    *images, question = words
    if os.path.isfile(question):  # False for a text that is too long for a path
        raise ConfigError(f"'{question}' is a file, but the last argument is the question: write it after the images")
    from teacher_cache.ask.compare import compare, comparison_json, recorded_role
    from teacher_cache.ask.model import AskedModel, AskedQuestion
    from teacher_cache.read.reader import open_cache

    asked = AskedQuestion.read(question, [Path(image) for image in images])
    opened = None if cache is None else open_cache(cache)
    if opened is not None and key is not None:
        recorded_role(opened, key)  # before the model is loaded
    asking = AskedModel(model, template=template, device=device, dtype=dtype)
    answer = asking.answer(asked, max_new_tokens, (lambda _: None) if as_json else _write)
    if not as_json:
        print(flush=True)
        if answer.finish != "stop":
            print(f"(the answer did not end within --max-new-tokens {max_new_tokens})", file=sys.stderr)
    compared = None if opened is None or key is None else compare(asking, opened, key, asked)
    if as_json:
        said = {**asking.describe(), "question": question, "images": images, **asdict(answer)}
        print(json.dumps(said | ({} if compared is None else {"cache": comparison_json(compared)}), ensure_ascii=False))
    elif compared is not None:
        _print(compared, str(cache))


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _print(compared: AnswerComparison, cache: str) -> None:
    from teacher_cache.inspection.terminal import Justify, add_row, make_console, make_table

    console = make_console()
    print()
    title = f"The answer of '{compared.key}' ({compared.role}) in {cache}, token by token"
    columns: list[tuple[str, Justify]] = [("token", "left"), ("teacher", "right"), ("model", "right")]
    columns += [("teacher's likeliest", "left"), ("model's likeliest", "left")]
    table = make_table(console, title, columns)
    for token in compared.tokens:
        tops = (", ".join(f"{name} {p:.2f}" for name, p in top) for top in (token.teacher_top, token.model_top))
        add_row(table, token.token, f"{token.teacher:.3f}", f"{token.model:.3f}", *tops)
    console.print(table)
    if compared.same_question is False:
        print(f"'{compared.key}' was captured for another question, image or wording: the model's column is for yours")
