"""Matching predictions with examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.example import Example
from eval.predictions import Prediction
from llavamod_offline.errors import EvalError

LISTED = 5


def join(
    examples: Sequence[Example[Any]],
    predictions: Sequence[Prediction],
    *,
    question_key: Callable[[str], str],
    path: Path,
    allow_missing: bool = False,
    unanswerable: Collection[str] = (),
) -> dict[str, Prediction]:
    """Match predictions with examples; returns them by example id, without white space around the answers.

    LLaVA's runners strip answers; the official scorers of GQA, POPE and ScienceQA misread unstripped answers.

    Our predictions are matched by `id`, LLaVA-style answers by `question_id`. If several examples share one (MME: two
    questions per image; TextVQA: the image's id), the question in the prompt decides.
    Errors: `EvalError` listing the first five unknown, duplicate or (unless `allow_missing`) missing ids; those in
    `unanswerable` may be missing.
    """
    by_id = {example.id: example for example in examples}
    if len(by_id) != len(examples):
        raise EvalError(f"{path}: the benchmark's question file has duplicate ids: download it again")
    by_alias: dict[str, list[Example[Any]]] = defaultdict(list)
    for example in examples:
        for alias in example.aliases:
            by_alias[alias].append(example)
    joined: dict[str, Prediction] = {}
    unknown: list[str] = []
    duplicate: list[str] = []
    for prediction in predictions:
        candidates = _candidates(prediction, by_id, by_alias, question_key)
        free = next((example for example in candidates if example.id not in joined), None)
        if free is not None:
            joined[free.id] = replace(prediction, text=prediction.text.strip())
        else:
            (duplicate if candidates else unknown).append(prediction.name)
    missing = [example.id for example in examples if example.id not in joined and example.id not in unanswerable]
    if unknown:
        raise EvalError(
            f"{path}: {_listed(unknown, 'prediction')} without a matching question: check that the "
            f"{len(predictions)} predictions are for this benchmark and this version of its question file"
        )
    if duplicate:
        raise EvalError(f"{path}: {_listed(duplicate, 'prediction')} duplicating an earlier one: keep one of each")
    if missing and not allow_missing:
        raise EvalError(
            f"{path}: {_listed(missing, 'question')} without a prediction: generate them, "
            "or count them as wrong with --allow-missing"
        )
    return joined


def _candidates(
    prediction: Prediction,
    by_id: dict[str, Example[Any]],
    by_alias: dict[str, list[Example[Any]]],
    question_key: Callable[[str], str],
) -> list[Example[Any]]:
    if prediction.id is not None:
        return [by_id[prediction.id]] if prediction.id in by_id else []
    assert prediction.question_id is not None
    sharing = by_alias.get(prediction.question_id, [])
    if prediction.question:
        sharing = [example for example in sharing if _asks(example, question_key(prediction.question), question_key)]
    if len(sharing) <= 1:
        return sharing
    if not prediction.prompt:
        raise EvalError(
            f"prediction '{prediction.name}': has no 'prompt', and several questions share its question_id: add it"
        )
    asked = question_key(prediction.prompt)
    return [example for example in sharing if example.question == asked]


def _asks(example: Example[Any], question: str, question_key: Callable[[str], str]) -> bool:
    prompt = " ".join(example.prompt.lower().split())
    return question in (example.question, question_key(example.prompt)) or question.lower() in prompt


def _listed(names: Sequence[str], noun: str) -> str:
    shown = ", ".join(f"'{name}'" if len(name) <= 80 else f"'{name[:80]}…'" for name in names[:LISTED])
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({shown}{', …' if len(names) > LISTED else ''})"
