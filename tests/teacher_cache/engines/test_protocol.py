"""What every engine returns for a sequence, whatever ran it."""

from __future__ import annotations

import numpy as np
import pytest

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.sample import Sample, Turn
from teacher_cache.engines.protocol import Request, beyond_vocabulary, recorded, rows_with_states
from teacher_cache.format.record import concatenate_records
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import HiddenPositions
from teacher_cache.format.sequences import SequenceRecord

IMAGE = 9
SEQUENCE = TokenizedSequence("a", "chosen", np.array([1, IMAGE, IMAGE, 4, 7]), np.array([3, 4]))
SAMPLE = Sample("a", (Turn("user", "?"), Turn("assistant", "!")))
REQUEST = Request(0, SAMPLE, (SEQUENCE,))


def test_a_supervised_id_must_have_a_probability() -> None:
    assert beyond_vocabulary(SEQUENCE, 8) is None  # the image's id is not at a supervised position
    assert (
        beyond_vocabulary(SEQUENCE, 7) == "supervised id 7 is beyond the 7 ids that the tokenizer and the LM head share"
    )
    assert beyond_vocabulary(TokenizedSequence("a", "chosen", np.array([1]), np.array([], np.int64)), 1) is None


@pytest.mark.parametrize(("which", "expected"), [(None, None), ("recorded", [0, 1, 2]), ("image", [1])])
def test_hidden_states_are_kept_of_the_chosen_rows(which: HiddenPositions | None, expected: list[int] | None) -> None:
    """Of the recorded rows 0, 2 and 3, one is an image's."""
    rows_M = rows_with_states(SEQUENCE, np.array([0, 2, 3]), which, IMAGE)
    assert (None if rows_M is None else rows_M.tolist()) == expected


def test_logits_that_are_not_finite_reject_a_sequence() -> None:
    records = concatenate_records([])
    kept = recorded(REQUEST, SEQUENCE, records, np.array([True, True]), None)
    assert isinstance(kept, SequenceRecord)
    assert (kept.key, kept.role, kept.content_hash, kept.n_tokens) == ("a", "chosen", SAMPLE.content_hash, 5)
    assert kept.target_hash == SEQUENCE.target_hash
    lost = recorded(REQUEST, SEQUENCE, records, np.array([True, False]), None)
    reason = "the teacher's logits are not finite (NaN or inf), first at position 1"
    assert lost == Rejection("a", "chosen", reason)
