"""The outcome of a source's row: a sample with its origin, or a rejection with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError

RejectionKind = Literal[
    "malformed row",  # not of the format's shape
    "bad conversation",  # invalid roles, turns or texts
    "identical answers",  # a preference whose two answers are the same
    "unsupported media",  # video or audio
    "placeholder mismatch",  # more or fewer <image> than images
    "bad image path",  # absolute, outside the image folders, or in two of them
    "missing image",
    "undecodable image",  # damaged, too large, or of an unsupported format
    "bad member",  # a tar's member that is not a plain file, or has an invalid or repeated name
    "damaged tar",  # truncated, or with foreign data
    "unanswerable prompt",  # the teacher that writes answers cannot process it
    "unfinished answer",  # the teacher reached its token limit
    "unusable answer",  # the teacher's answer makes no valid sample
]


class RowError(DataError):
    """A row yields no sample; it becomes a `RejectedRow`, and reading continues. `image`: as in `RejectedRow`."""

    def __init__(self, kind: RejectionKind, reason: str, image: str = "") -> None:
        super().__init__(reason)
        self.kind: RejectionKind = kind
        self.image = image

    def __reduce__(self) -> tuple[type[RowError], tuple[RejectionKind, str, str]]:
        return RowError, (self.kind, str(self), self.image)


@dataclass(frozen=True)
class Located:
    """A sample with its source file and row (from 0)."""

    sample: Sample
    file: str
    row: int


@dataclass(frozen=True)
class RowPlace:
    """Where reading continues: at a row (from 0) of a file; `done` of its samples or rejections already exist."""

    file: str
    row: int
    done: int = 0


@dataclass(frozen=True)
class RejectedRow:
    """A row that yields no sample; summaries count each `kind`, `reason` explains this one.

    `image`: the name of an image file that is missing or cannot be used, as the row has it.
    """

    key: str
    kind: RejectionKind
    reason: str
    file: str
    row: int
    image: str = ""
