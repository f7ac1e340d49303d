"""From the records of a teacher to targets in the ids of a student with another tokenizer.

Shape suffixes: N positions of the teacher, S spans, K slots of the top-k, K1 those and one for the actual token, V ids
of the student, W ids of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import ConfigError, TargetError
from llavamod_offline.losses.other_tokenizer.targets import AlignedTargets
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from teacher_cache.fingerprint import added_tokens
from teacher_cache.other_tokenizer.spans import Span, align
from teacher_cache.other_tokenizer.token_bytes import TokenBytes, token_bytes
from teacher_cache.student.token_list import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.tokenize import Ids, TokenizedSequence
    from teacher_cache.read.reader import TeacherCache


@dataclass(frozen=True, eq=False)
class TokenizerBridge:
    """The tokens of a teacher and a student by their bytes, and the id with which each ends a turn.

    `to_student_W`: the student's id with the bytes of each of the teacher's, −1 if there is none, or if it already
    stands for another of the teacher's. `has_counterpart_V`: the student's ids that are among these.
    """

    teacher: TokenBytes
    student: TokenBytes
    end_ids: tuple[int, int]
    to_student_W: NDArray[np.int64]
    has_counterpart_V: NDArray[np.bool_]

    @classmethod
    def of(cls, teacher: TokenBytes, student: TokenBytes, end_ids: tuple[int, int]) -> TokenizerBridge:
        """Match two vocabularies: one to one by bytes, except the ends of a turn, which match by role."""
        to_student_W = np.full(len(teacher.pieces), EMPTY_ID, np.int64)
        for piece, number in teacher.ids.items():
            to_student_W[number] = student.ids.get(piece, EMPTY_ID)
        to_student_W[to_student_W == end_ids[1]] = EMPTY_ID
        to_student_W[end_ids[0]] = end_ids[1]
        has_counterpart_V = np.zeros(len(student.pieces), np.bool_)
        has_counterpart_V[to_student_W[to_student_W != EMPTY_ID]] = True
        return cls(teacher, student, end_ids, to_student_W, has_counterpart_V)

    def spans(self, teacher_ids: Ids, sequence: TokenizedSequence) -> list[Span]:
        """Align a student's sequence with the teacher's supervised ids. Errors: as `align`, `TargetError`."""
        where = f"sample '{sequence.key}' ({sequence.role})"
        theirs, mine = teacher_ids.tolist(), sequence.target_ids_N.tolist()
        if theirs and theirs[-1] != self.end_ids[0]:
            raise TargetError(
                f"{where}: the cache ends its answer with token {theirs[-1]}, others with {self.end_ids[0]}: capture "
                "all sets of the cache with one template"
            )
        sides = {"teacher": self.teacher, "student": self.student}
        return align(theirs, mine, **sides, end_ids=self.end_ids, where=where)

    def targets(
        self, records: SparseTargets, counts: Sequence[int], sequences: Sequence[TokenizedSequence]
    ) -> AlignedTargets:
        """The targets of a batch of sequences, from the records of each, `counts` of them, one after another.

        Rows count the supervised tokens of all sequences, in order. Errors: as `spans`.
        """
        numbers_N = torch.arange(len(records)).split(list(counts))
        found: list[tuple[Span, int, int]] = []  # with the number of tokens before its sequence on each side
        kept: list[Tensor] = []
        before = own_before = 0
        for numbers, sequence in zip(numbers_N, sequences, strict=True):
            ids = records.target_ids_N[numbers].long()
            kept.append(numbers[ids != NO_TARGET])
            spans = self.spans(ids[ids != NO_TARGET].numpy(), sequence)
            found += [(span, before, own_before) for span in spans]
            before, own_before = before + len(kept[-1]), own_before + len(sequence.supervised_N)
        records = records.take(torch.cat(kept)) if kept else records
        student_ids_N = np.concatenate([np.zeros(0, np.int64), *(s.target_ids_N for s in sequences)])
        placed = [
            replace(
                span,
                teacher=(span.teacher[0] + theirs, span.teacher[1] + theirs),
                student=(span.student[0] + mine, span.student[1] + mine),
            )
            for span, theirs, mine in found
        ]
        return self._merged(records, student_ids_N, placed)

    def _merged(self, records: SparseTargets, student_ids_N: Ids, spans: list[Span]) -> AlignedTargets:
        last_S = torch.tensor([span.teacher[1] - 1 for span in spans], dtype=torch.long)
        rows_S = torch.tensor([span.student[1] - 1 for span in spans], dtype=torch.long)
        sums_N = torch.cat([torch.zeros(1), records.target_log_probs_N]).double().cumsum(0)
        first_S = torch.tensor([span.teacher[0] for span in spans], dtype=torch.long)
        path_S = (sums_N[last_S] - sums_N[first_S]).float()
        own = records.take(last_S)
        ids_SK = own.topk_ids_NK.long()
        matched_SK = torch.from_numpy(self.to_student_W)[ids_SK.clamp(min=0)].masked_fill(ids_SK < 0, EMPTY_ID)
        for number, span in enumerate(spans):
            if not span.is_single:
                matched_SK[number] = self._by_bytes(span, records.target_ids_N, student_ids_N, ids_SK[number])
        # The actual tokens end both spans, so they correspond, whatever their ids.
        actual_S, said_S = own.target_ids_N.long(), torch.from_numpy(student_ids_N)[rows_S]
        is_actual_SK = ids_SK == actual_S[:, None]
        matched_SK = torch.where(is_actual_SK, said_S[:, None], matched_SK)
        matched_SK = matched_SK.masked_fill((matched_SK == said_S[:, None]) & ~is_actual_SK, EMPTY_ID)
        outside_S = ~is_actual_SK.any(-1)
        actual_log_probs_S = own.target_log_probs_N.masked_fill(~outside_S, -torch.inf)
        tail_S = (own.tail_log_mass_N.double().exp() - actual_log_probs_S.double().exp()).clamp(min=0)
        log_probs_SK = own.topk_log_probs_NK
        is_unmatched_SK = (matched_SK == EMPTY_ID) & (ids_SK >= 0)
        unmatched_SK = log_probs_SK.masked_fill(~is_unmatched_SK, -torch.inf).sort(-1, descending=True).values
        most = int(is_unmatched_SK.sum(-1).max()) if len(spans) else 0
        matched_SK1 = torch.cat([matched_SK, torch.where(outside_S, said_S, EMPTY_ID)[:, None]], 1)
        log_probs_SK1 = torch.cat([log_probs_SK, actual_log_probs_S[:, None]], 1)
        earlier = [np.arange(span.student[0], span.student[1] - 1) for span in spans]
        return AlignedTargets(
            rows_S=rows_S,
            rows_P=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *earlier])),
            spans_P=torch.from_numpy(np.repeat(np.arange(len(spans)), [len(rows) for rows in earlier])),
            topk_ids_SK=matched_SK1,
            topk_log_probs_SK=(log_probs_SK1 + path_S[:, None]).masked_fill(matched_SK1 == EMPTY_ID, -torch.inf),
            unmatched_log_probs_SU=unmatched_SK[:, :most] + path_S[:, None],
            tail_log_mass_S=tail_S.log().float() + path_S,
            path_log_probs_S=path_S,
            is_single_S=torch.tensor([span.is_single for span in spans], dtype=torch.bool),
        )

    def _by_bytes(self, span: Span, teacher_ids_N: Tensor, student_ids_N: Ids, ids_K: Tensor) -> Tensor:
        """The student's ids that complete a span as each of the teacher's does, given the span's earlier tokens."""
        theirs = teacher_ids_N[span.teacher[0] : span.teacher[1] - 1].tolist()
        said = span.teacher_before + self.teacher.join(theirs)
        own = span.student_before + self.student.join(student_ids_N[span.student[0] : span.student[1] - 1].tolist())
        found = []
        for number in ids_K.tolist():
            piece = self.teacher.pieces[number] if number >= 0 else None
            whole = said + piece if piece and self.teacher.ids.get(piece) == number else b""
            ends = number in self.end_ids[:1] or not whole.startswith(own)
            found.append(EMPTY_ID if ends else self.student.ids.get(whole[len(own) :], EMPTY_ID))
        return torch.tensor(found, dtype=torch.long)


def open_bridge(
    cache: TeacherCache, tokenizer: PreTrainedTokenizerFast, *, end_id: int, vocab_size: int
) -> TokenizerBridge:
    """The bridge from a cache's teacher to a student that ends turns with `end_id` and has `vocab_size` ids.

    The teacher's tokens are those of the cache's fingerprint; it ends turns with the last token of its sequences.
    Errors: `ConfigError` if the cache does not list the teacher's tokens or has no answers, or as `token_bytes`.
    """
    described: Mapping[str, Any] = cache.fingerprint["tokenizer"]
    if not isinstance(described.get("tokens"), str):
        raise ConfigError(
            f"cache.other_tokenizer: cache '{cache.path}' does not list its teacher's tokens: capture again, or "
            "remove it and use a student with the teacher's tokenizer"
        )
    theirs = token_bytes(Tokens.unpack(described["tokens"]), size=cache.vocab_size, whose="the teacher's")
    own = Tokens.of(tokenizer.get_vocab(), added_tokens(tokenizer))
    mine = token_bytes(own, size=vocab_size, whose="the student's")
    ends = cache.target_ids(*cache.items([0])[0])[-1:].tolist() if len(cache) else []
    if not ends:
        raise ConfigError(f"cache.other_tokenizer: cache '{cache.path}' holds no answers: capture a set that has some")
    return TokenizerBridge.of(theirs, mine, (ends[0], end_id))
