"""A declared swap of two ids: the teacher's end-of-turn token is read as the student's.

`cache.end_of_turn: "<A>=<B>"` declares that teacher and student differ only in the token that ends an answer. Reading
then swaps the teacher's id of A and the student's id of B everywhere: in supervised ids, top-k ids and tail samples.
Since that permutes ids, all distributions stay valid: no id occurs twice, no mass is added or lost, and if both ids are
among the top-k, each takes the other's mass. Log normalisers, entropy and summed log-probs do not depend on ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.errors import ConfigError
from llavamod_offline.losses.targets import SparseTargets

Vocabulary = Mapping[str, int]


@dataclass(frozen=True)
class TokenIdSwap:
    """Two ids to swap: the teacher's id of its end-of-turn token, and the student's id of its own."""

    teacher_id: int
    student_id: int

    def ids(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Swap the two ids wherever they occur; its own inverse."""
        changed = ids.copy()
        changed[ids == self.teacher_id] = self.student_id
        changed[ids == self.student_id] = self.teacher_id
        return changed

    def targets(self, targets: SparseTargets) -> SparseTargets:
        """Targets in the student's ids. Both ids belong to the vocabulary, so V may grow by one."""
        return replace(
            targets,
            topk_ids_NK=self._tensor(targets.topk_ids_NK),
            tail_ids_NM=self._tensor(targets.tail_ids_NM),
            target_ids_N=self._tensor(targets.target_ids_N),
            vocab_size=self.vocab_size(targets.vocab_size),
        )

    def vocab_size(self, cached: int) -> int:
        """The vocabulary size after the swap; `cached`: before it."""
        return max(cached, self.teacher_id + 1, self.student_id + 1)

    def profile(self, profile_V: Tensor) -> Tensor:
        """A tail profile [V] in the student's ids, as long as the targets' vocabulary."""
        longer_V = torch.nn.functional.pad(profile_V, (0, self.vocab_size(len(profile_V)) - len(profile_V)))
        changed_V = longer_V.clone()
        changed_V[self.teacher_id], changed_V[self.student_id] = longer_V[self.student_id], longer_V[self.teacher_id]
        return changed_V

    def _tensor(self, ids: Tensor) -> Tensor:
        to_teacher, to_student = ids == self.student_id, ids == self.teacher_id
        return ids.masked_fill(to_student, self.student_id).masked_fill(to_teacher, self.teacher_id)


def parse_end_of_turn(setting: str) -> tuple[str, str]:
    """Split `<teacher token>=<student token>`. Errors: `ConfigError` if it is not of this form."""
    parts = setting.split("=")
    if len(parts) != 2 or not all(parts):
        raise ConfigError(
            f"cache.end_of_turn: '{setting}': expected TEACHER_TOKEN=STUDENT_TOKEN, such as '<|im_end|>=<|endoftext|>'"
        )
    return parts[0], parts[1]


def teacher_vocabularies(student: Vocabulary, theirs: str, mine: str) -> Iterator[tuple[dict[str, int], TokenIdSwap]]:
    """The possible vocabularies of a teacher whose tokenizer differs from the student's only in the end of turn.

    `student` maps tokens to ids; `theirs` and `mine` are the tokens. Hashes decide which vocabulary is the teacher's.
    Errors: `ConfigError` if the student has no token `mine`.
    """
    if mine not in student:
        raise ConfigError(
            f"cache.end_of_turn: the student's tokenizer has no token '{mine}': name the token that ends its answers"
        )
    own, beyond = student[mine], max(student.values()) + 1
    rest = {token: number for token, number in student.items() if token != mine}
    if theirs not in student:
        yield {**rest, theirs: own}, TokenIdSwap(own, own)  # the same id under another name
        yield {**student, theirs: beyond}, TokenIdSwap(beyond, own)  # the teacher has one token more
        return
    yield dict(student), TokenIdSwap(student[theirs], own)  # the same tokenizer, ending answers with another token
    yield {**rest, theirs: own, mine: student[theirs]}, TokenIdSwap(own, own)  # the two ids swapped
    yield rest, TokenIdSwap(student[theirs], own)  # the student has one token more
