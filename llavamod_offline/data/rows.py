"""What a source gives for each of its rows: a sample and its place, or a rejection that says why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError

RejectionKind = Literal[
    "malformed row",  # not the shape that the format asks for
    "bad conversation",  # roles, turns or texts that make no sample
    "placeholder mismatch",  # more or fewer <image> than images
    "bad image path",  # absolute, leading out of the image folders, in two of them
    "missing image",
    "undecodable image",  # damaged, too large, or of a format that is not taken
    "bad member",  # a tar's member that is no plain file, has a name that is not taken, or the name of another
    "damaged tar",  # cut short, or with something in it that is no tar
    "unanswerable prompt",  # a teacher that writes answers cannot take it
    "unfinished answer",  # the teacher did not come to an end
    "unusable answer",  # what the teacher wrote makes no sample
]


class RowError(DataError):
    """One row gives no sample; it becomes a `RejectedRow` and the next row is read."""

    def __init__(self, kind: RejectionKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RejectionKind = kind

    def __reduce__(self) -> tuple[type[RowError], tuple[RejectionKind, str]]:
        return RowError, (self.kind, str(self))


@dataclass(frozen=True)
class Located:
    """A sample and the row (from 0) of the file that it was read from."""

    sample: Sample
    file: str
    row: int


@dataclass(frozen=True)
class RejectedRow:
    """A row that gives no sample; `kind` is what a summary counts, `reason` says what is wrong with this one."""

    key: str
    kind: RejectionKind
    reason: str
    file: str
    row: int
