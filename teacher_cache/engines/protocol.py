"""The interface of an engine (a data shard's sequences in, their records out), and what all engines share.

Shape suffixes: N recorded positions of the sequence, M those of them whose hidden state is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import Ids, TokenizedSequence
from llavamod_offline.data.sample import Sample
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.record import Records, RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import HiddenPositions
from teacher_cache.format.sequences import SequenceRecord

Outcome = SequenceRecord | Rejection
NOT_FINITE = "the teacher's logits are not finite (NaN or inf)"


@dataclass(frozen=True)
class Request:
    """One sample to capture: its row in the set, its content, and its tokenized roles."""

    row: int
    sample: Sample
    sequences: tuple[TokenizedSequence, ...]


class CaptureEngine(Protocol):
    """A way to run the teacher; `settings` say what its records keep, and may be replaced in a copy."""

    settings: RecordSettings

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Capture every sequence of one data shard, in any order.

        Batches depend on `requests` alone, so that capturing a shard again gives the same records.
        """
        ...


def longest_first(requests: Sequence[Request]) -> list[Request]:
    """Requests by decreasing length, ties by row."""
    return sorted(requests, key=lambda r: (-max(len(s.input_ids_T) for s in r.sequences), r.row))


def beyond_vocabulary(sequence: TokenizedSequence, vocab_size: int) -> str | None:
    """Why a sequence with a supervised id outside the shared vocabulary cannot be captured; None if it has none."""
    largest = int(sequence.target_ids_N.max(initial=0))
    if largest < vocab_size:
        return None
    return f"supervised id {largest} is beyond the {vocab_size} ids that the tokenizer and the LM head share"


def rows_with_states(
    sequence: TokenizedSequence, rows_N: Ids, which: HiddenPositions | None, image_token_id: int | None
) -> NDArray[np.int64] | None:
    """The recorded rows whose hidden state is kept, as indices [M] into `rows_N`; None if none are wanted."""
    if which is None:
        return None
    if which == "image":
        return np.flatnonzero(sequence.input_ids_T[rows_N] == image_token_id)
    return np.arange(len(rows_N))


def recorded(
    request: Request,
    sequence: TokenizedSequence,
    records: Records,
    finite_N: NDArray[np.bool_],
    hidden: HiddenStates | None,
) -> Outcome:
    """The record of a sequence, or its rejection if any of its N positions' logits were not finite."""
    if not finite_N.all():
        first = int(np.argmin(finite_N))
        return Rejection(sequence.key, sequence.role, f"{NOT_FINITE}, first at position {first}")
    return SequenceRecord(
        key=sequence.key,
        role=sequence.role,
        target_hash=sequence.target_hash,
        content_hash=request.sample.content_hash,
        n_tokens=len(sequence.input_ids_T),
        records=records,
        hidden=hidden,
    )
