"""Rejected sequences, counted by kind of reason and compared with the allowed share."""

from __future__ import annotations

import math
import re
from collections import Counter
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
    """Why `count` sequences were rejected, without names and numbers; the first reason in full; the first keys."""

    kind: str
    count: int
    example: str
    keys: list[str]


class Rejected:
    """Counts captured and rejected sequences; `limit` is the share that may be rejected.

    The limit applies once 1 / limit sequences are counted, or at the end: the first bad sample does not stop a run.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._found: dict[str, list[Rejection]] = {}
        self._counts: Counter[str] = Counter()
        self._captured = 0

    @property
    def count(self) -> int:
        """How many sequences were rejected."""
        return self._counts.total()

    def add(self, captured: int, rejected: Iterable[Rejection]) -> None:
        """Count some sequences."""
        self._captured += captured
        for item in rejected:
            kind = reason_kind(item)
            self._counts[kind] += 1
            if self._counts[kind] <= _KEYS_SHOWN:
                self._found.setdefault(kind, []).append(item)

    def reasons(self) -> list[Reason]:
        """The kinds of reasons, most frequent first."""
        return [
            Reason(kind, count, self._found[kind][0].reason, [item.key for item in self._found[kind]])
            for kind, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def check(self, output: str, *, last: bool = False) -> None:
        """Stop a run that rejects too much: `DataError` with the most frequent reason; `last`: the run is over."""
        seen = self._captured + self.count
        if self._limit is None or self.count <= self._limit * seen:
            return
        if not last and self._limit > 0 and seen < math.ceil(1 / self._limit):
            return
        reason = self.reasons()[0]
        raise DataError(
            f"{output}: {self.count} of {seen} sequences rejected, more than max_rejected={self._limit:g} allows; "
            f"{reason.count} of them like '{reason.keys[0]}' ({reason.example}); all are in "
            f"{output}/shards/*/rejected.jsonl: correct the set or the settings, or allow more and rerun to resume"
        )


def reason_kind(item: Rejection) -> str:
    """A reason without what varies between samples: their own names, quoted names, numbers."""
    text = _OWN_NAME.sub("", item.reason.replace("\n", " "))
    text = re.sub(rf"(?<![\w-]){re.escape(item.key)}(?![\w-])", "…", _QUOTED.sub("'…'", text))
    return _NUMBER.sub("N", text)
