"""What an engine makes of a sequence: its record, or the reason why it has none. The same whichever engine ran it.

Shape suffixes: N recorded positions of the sequence, M those of them whose hidden state is kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import Ids, TokenizedSequence
from teacher_cache.engines.protocol import Request
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.record import Records
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import HiddenPositions
from teacher_cache.format.sequences import SequenceRecord

Outcome = SequenceRecord | Rejection


def beyond_vocabulary(sequence: TokenizedSequence, vocab_size: int) -> str | None:
    """Why a sequence cannot be captured if one of its supervised ids has no probability; None if all have one."""
    largest = int(sequence.target_ids_N.max(initial=0))
    if largest < vocab_size:
        return None
    return f"supervised id {largest} is beyond the {vocab_size} ids that the tokenizer and the LM head share"


def rows_with_states(
    sequence: TokenizedSequence, rows_N: Ids, which: HiddenPositions | None, image_token_id: int | None
) -> NDArray[np.int64] | None:
    """Which of the recorded rows keep their hidden state, as indices [M] into `rows_N`; None where none are wanted."""
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
    """The record of a sequence that was run, or its rejection if any of its N positions' logits were not finite."""
    if not finite_N.all():
        first = int(np.argmin(finite_N))
        reason = f"the teacher's logits are not finite (NaN or inf), first at position {first}"
        return Rejection(sequence.key, sequence.role, reason)
    return SequenceRecord(
        key=sequence.key,
        role=sequence.role,
        target_hash=sequence.target_hash,
        content_hash=request.sample.content_hash,
        n_tokens=len(sequence.input_ids_T),
        records=records,
        hidden=hidden,
    )
