"""Spans of tokens that stand for the same bytes in two tokenizers.

A span ends where a token of each side ends at the same byte: these are the smallest spans that both share. Positions in
bytes are counted from the answer's first byte that is not white space, so that a template may put a space before
answers; white-space tokens around an answer belong to the span after or before them. The end of a turn is one token on
either side, whatever it is called, and counts as one byte more than the answer.

Source: GOLD (TRL, `ULDLoss._align_by_byte_offsets`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from llavamod_offline.errors import TargetError
from teacher_cache.other_tokenizer.token_bytes import TokenBytes

_SHOWN = 24


@dataclass(frozen=True)
class Span:
    """Tokens of teacher and student, as [start, stop) of a sequence's supervised tokens.

    `teacher_before`, `student_before`: the white space that only the other side has before an answer's first token.
    """

    teacher: tuple[int, int]
    student: tuple[int, int]
    teacher_before: bytes = b""
    student_before: bytes = b""

    @property
    def is_single(self) -> bool:
        """Whether both sides have one token, which begins at the same byte."""
        one = all(stop - start == 1 for start, stop in (self.teacher, self.student))
        return one and not (self.teacher_before or self.student_before)


def shared_spans(teacher_ends: Sequence[int], student_ends: Sequence[int]) -> list[tuple[int, int]]:
    """Where spans stop, as pairs of token counts, given where each token ends (non-decreasing, last ends equal)."""
    stops, teacher, student = [], 0, 0
    while teacher < len(teacher_ends) and student < len(student_ends):
        difference = teacher_ends[teacher] - student_ends[student]
        teacher += difference <= 0
        student += difference >= 0
        if difference == 0:
            stops.append((teacher, student))
    return stops


def align(
    teacher_ids: Sequence[int],
    student_ids: Sequence[int],
    *,
    teacher: TokenBytes,
    student: TokenBytes,
    end_ids: tuple[int, int],
    where: str,
) -> list[Span]:
    """Align the supervised tokens of a sequence, turn by turn; `end_ids` end a turn of teacher and student.

    Errors: `TargetError` naming `where` if the two do not say the same turns.
    """
    theirs, mine = _turns(teacher_ids, end_ids[0]), _turns(student_ids, end_ids[1])
    if len(theirs) != len(mine):
        raise TargetError(
            f"{where}: the cache has {len(theirs)} answers, the student {len(mine)}: use a template that trains the "
            "same turns as the teacher's, or capture again"
        )
    spans = []
    for (start, stop), (own_start, own_stop) in zip(theirs, mine, strict=True):
        said = _Said.of([*teacher_ids[start : stop - 1]], teacher)
        own = _Said.of([*student_ids[own_start : own_stop - 1]], student)
        ends, own_ends = _comparable_ends(said, own, where)
        longer = max(said.before, own.before, key=len)
        befores = tuple(longer[: len(longer) - len(side.before)] for side in (said, own))
        at = (0, 0)
        for to in shared_spans(ends, own_ends):
            first = befores if at == (0, 0) else (b"", b"")
            spans.append(Span((start + at[0], start + to[0]), (own_start + at[1], own_start + to[1]), *first))
            at = to
    return spans


@dataclass(frozen=True)
class _Said:
    """An answer without its end: the white space before it, its other bytes, and where each token of it ends there."""

    before: bytes
    content: bytes
    ends: list[int]

    @classmethod
    def of(cls, ids: list[int], tokens: TokenBytes) -> _Said:
        whole = tokens.join(ids)
        before = len(whole) - len(whole.lstrip())
        content = whole.strip()
        ends, at = [], -before
        for number in ids:
            at += len(tokens.pieces[number] or b"")
            ends.append(min(max(at, 0), len(content)))
        return cls(whole[:before], content, ends)


def _turns(ids: Sequence[int], end_id: int) -> list[tuple[int, int]]:
    """Turns as [start, stop), their ends included."""
    stops = [place + 1 for place, number in enumerate(ids) if number == end_id]
    if not stops or stops[-1] != len(ids):
        stops.append(len(ids))
    return list(zip([0, *stops[:-1]], stops, strict=True)) if len(ids) else []


def _comparable_ends(said: _Said, own: _Said, where: str) -> tuple[list[int], list[int]]:
    """Where tokens end in the bytes of one text, the end of the turn included.

    Tokenizers may compose characters differently (Unicode NFC): then only places that composition leaves intact count.
    Errors: `TargetError` if the texts differ in more than that.
    """
    if said.content == own.content:
        size = len(said.content)
        return [*said.ends, size + 1], [*own.ends, size + 1]
    composed = [_composed(side.content, where) for side in (said, own)]
    if composed[0] != composed[1]:
        at = next((n for n, pair in enumerate(zip(*composed, strict=False)) if pair[0] != pair[1]), len(composed[1]))
        shown = [ascii(text[at : at + _SHOWN]) for text in composed]
        raise TargetError(
            f"{where}: from character {at} on, the teacher's tokens read {shown[0]}, the student's {shown[1]}: set "
            "data.set to the set of the cache, and use a tokenizer that keeps its text"
        )
    size = len(composed[0].encode())
    return [*_composed_ends(said), size + 1], [*_composed_ends(own), size + 1]


def _composed(content: bytes, where: str) -> str:
    try:
        return unicodedata.normalize("NFC", content.decode())
    except UnicodeDecodeError as error:
        raise TargetError(f"{where}: its tokens are not UTF-8 text: use a tokenizer that keeps its text") from error


def _composed_ends(side: _Said) -> list[int]:
    """Where tokens end in the composed text; a token that ends inside a composition ends where that began."""
    text = side.content.decode()
    composed = unicodedata.normalize("NFC", text)
    found, at = {0: 0}, 0
    for place in range(1, len(text) + 1):
        at += len(text[place - 1].encode())
        head = unicodedata.normalize("NFC", text[:place])
        if head + unicodedata.normalize("NFC", text[place:]) == composed:
            found[at] = len(head.encode())
    ends, last = [], 0
    for end in side.ends:
        last = found.get(end, last)
        ends.append(last)
    return ends
