"""The interface of an engine: a data shard's sequences in, their records out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.sample import Sample
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord


@dataclass(frozen=True)
class Request:
    """One sample to capture: its row in the set, its content, and its tokenized roles."""

    row: int
    sample: Sample
    sequences: tuple[TokenizedSequence, ...]


def longest_first(requests: Sequence[Request]) -> list[Request]:
    """Requests by falling length, those of equal length by row."""
    return sorted(requests, key=lambda r: (-max(len(s.input_ids_T) for s in r.sequences), r.row))


class CaptureEngine(Protocol):
    """A way to run the teacher; `settings` say what its records keep, and may be replaced in a copy."""

    settings: RecordSettings

    def capture(self, requests: Sequence[Request]) -> Iterator[SequenceRecord | Rejection]:
        """Capture every sequence of one data shard, in any order.

        Batches depend on `requests` alone, so that capturing a shard again gives the same records.
        """
        ...
