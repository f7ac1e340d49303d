"""What could not be captured: counted by kind of reason, and held against the share that is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from llavamod_offline.errors import DataError
from teacher_cache.format.rejection import Rejection

_KEYS_SHOWN = 3
_OWN_NAME = re.compile(r"^(?:set|sample|image) '[^']*'(?: \([^)]*\))?: ")
_QUOTED = re.compile(r"'[^']*'")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Reason:
    """Why `count` sequences were rejected, without names and numbers; the first one's reason in full; first keys."""

    kind: str
    count: int
    example: str
    keys: list[str]


class Rejected:
    """Counts sequences as they are captured or rejected; `limit` is the share of rejected ones that is allowed.

    A share is held against the limit once there are so many sequences (1 / limit) that one may be rejected, or no more
    to come: the first bad sample of a set does not stop its run.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._found: dict[str, list[Rejection]] = {}
        self._counts: dict[str, int] = {}
        self._captured = 0

    @property
    def count(self) -> int:
        """How many sequences were rejected."""
        return sum(self._counts.values())

    def add(self, captured: int, rejected: Iterable[Rejection]) -> None:
        """Count some sequences."""
        self._captured += captured
        for item in rejected:
            kind = reason_kind(item)
            self._counts[kind] = self._counts.get(kind, 0) + 1
            examples = self._found.setdefault(kind, [])
            if len(examples) < _KEYS_SHOWN:
                examples.append(item)

    def reasons(self) -> list[Reason]:
        """The kinds of reasons, the most frequent first."""
        return [
            Reason(kind, count, self._found[kind][0].reason, [item.key for item in self._found[kind]])
            for kind, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def check(self, output: str, *, last: bool = False) -> None:
        """Stop a run that rejects too much; `last`: no more sequences will come.

        Errors: `DataError` with the most frequent reason and the first sequence that had it.
        """
        seen = self._captured + self.count
        if self._limit is None or self.count <= self._limit * seen:
            return
        if not last and self._limit > 0 and seen < math.ceil(1 / self._limit):
            return
        reason = self.reasons()[0]
        raise DataError(
            f"{output}: {self.count} of {seen} sequences rejected, more than max_rejected={self._limit:g} allows; "
            f"{reason.count} of them like '{reason.keys[0]}' ({reason.example}); all are in "
            f"{output}/shards/*/rejected.jsonl: correct the set or the settings, or allow more and run again to resume"
        )


def reason_kind(item: Rejection) -> str:
    """A reason without what differs from sample to sample: its own name, quoted names, numbers."""
    text = _OWN_NAME.sub("", item.reason.replace("\n", " "))
    text = re.sub(rf"(?<![\w-]){re.escape(item.key)}(?![\w-])", "…", _QUOTED.sub("'…'", text))
    return _NUMBER.sub("N", text)
