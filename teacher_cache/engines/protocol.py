"""What every engine does: take a data shard's sequences, give back their records."""

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
    """One sample to capture: its row in the set, what was read there, and its tokenized roles."""

    row: int
    sample: Sample
    sequences: tuple[TokenizedSequence, ...]


class CaptureEngine(Protocol):
    """A way to run the teacher; `settings` say what its records keep, and may be others in a copy of it."""

    settings: RecordSettings

    def capture(self, requests: Sequence[Request]) -> Iterator[SequenceRecord | Rejection]:
        """Capture every sequence of one data shard, in any order.

        What goes into a batch depends on `requests` alone, so that a shard made again is the same.
        """
        ...
