"""What a cached teacher and a model say at each token of the teacher's recorded answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llavamod_offline.data.keys import stored_key
from llavamod_offline.errors import CacheError
from llavamod_offline.losses.targets import EMPTY_ID
from teacher_cache.ask.model import AskedModel, AskedQuestion
from teacher_cache.format.sequences import short_hash
from teacher_cache.inspection.token_labels import TokenNames
from teacher_cache.read.reader import TeacherCache
from teacher_cache.student.check import check_student

_ROLES = ("response", "chosen")


@dataclass(frozen=True)
class ComparedToken:
    """A token of the recorded answer: its probability and the most likely tokens under the teacher and the model."""

    token: str
    teacher: float
    model: float
    teacher_top: tuple[tuple[str, float], ...]
    model_top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class AnswerComparison:
    """The first answer recorded under a key. `same_question`: whether it was captured for this question and these
    images; None if that is unknown, as for a conversation of several answers or a preference."""

    key: str
    role: str
    same_question: bool | None
    tokens: tuple[ComparedToken, ...]


def recorded_role(cache: TeacherCache, key: str) -> tuple[str, str]:
    """A sample's key as stored, and the role whose answer is shown. Errors: `CacheError` if it has no record."""
    key = stored_key(key, lambda one: any((one, role) in cache for role in (*_ROLES, *cache.roles)))
    role = next((role for role in (*_ROLES, *cache.roles) if (key, role) in cache), None)
    if role is None:
        some = ", ".join(sorted(key for key, _ in cache.items(range(min(3, len(cache))))))
        raise CacheError(f"cache '{cache.path}': no record of sample '{key}': it has {len(cache):,}, such as {some}")
    return key, role


def compare(
    model: AskedModel, cache: TeacherCache, key: str, question: AskedQuestion, *, top_k: int = 3
) -> AnswerComparison:
    """Run a model on the question and the answer recorded under `key`, and compare its distributions with the cache's.

    Errors: `CacheError` if the key has no record, or the model has another tokenizer; see `check_student`.
    """
    key, role = recorded_role(cache, key)
    check_student(cache.fingerprint, model.encoder.tokenizer)
    targets = cache.targets([(key, role)])
    numbers = targets.target_ids_N.tolist()
    supervised = [row for row, number in enumerate(numbers) if number >= 0]  # also for a cache of all positions
    ends = [place for place, row in enumerate(supervised) if numbers[row] == model.encoder.end_id]
    rows = supervised[: ends[0] + 1] if ends else supervised  # the first answer
    names = TokenNames(None)
    names.tokenizer = model.encoder.tokenizer
    found = []
    for row, log_probs_V in zip(rows, model.log_probs(question, [numbers[row] for row in rows]), strict=True):
        own_K, ids_K = log_probs_V.topk(top_k)
        topk = zip(targets.topk_ids_NK[row].tolist(), targets.topk_log_probs_NK[row].tolist(), strict=True)
        theirs = sorted(((value, number) for number, value in topk if number != EMPTY_ID), reverse=True)[:top_k]
        found.append(
            ComparedToken(
                token=names.label(numbers[row]),
                teacher=math.exp(float(targets.target_log_probs_N[row])),
                model=math.exp(float(log_probs_V[numbers[row]])) if numbers[row] < len(log_probs_V) else 0.0,
                teacher_top=tuple((names.label(number), math.exp(value)) for value, number in theirs),
                model_top=tuple(
                    (names.label(number), math.exp(value))
                    for value, number in zip(own_K.tolist(), ids_K.tolist(), strict=True)
                ),
            )
        )
    several = len(rows) < len(supervised)
    answer = model.text([numbers[row] for row in rows[:-1]]).removeprefix(model.encoder.template.answer_prefix)
    same = None if several or role != "response" else _same(cache, key, role, question, answer)
    return AnswerComparison(key, role, same, tuple(found))


def comparison_json(comparison: AnswerComparison) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        "key": comparison.key,
        "role": comparison.role,
        "same_question": comparison.same_question,
        "tokens": [
            {
                "token": token.token,
                "teacher": token.teacher,
                "model": token.model,
                "teacher_top": [{"token": name, "p": p} for name, p in token.teacher_top],
                "model_top": [{"token": name, "p": p} for name, p in token.model_top],
            }
            for token in comparison.tokens
        ],
    }


def _same(cache: TeacherCache, key: str, role: str, question: AskedQuestion, answer: str) -> bool:
    """Whether the record was made for this question, these images and this answer."""
    if not answer.strip():
        return False
    return short_hash(question.sample(answer).content_hash) == cache.sequence(key, role).content_hash
