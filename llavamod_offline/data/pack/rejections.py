"""The rejections of a new set: counted by kind, listed in a file, and explained if most have the same reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import IO

from llavamod_offline.data.rows import RejectedRow

_PARTICULARS = re.compile(r"'[^']*'|[0-9]+")  # what differs from row to row in otherwise equal reasons
_MAX_REASONS = 1000
_MAX_IMAGES = 64


class Rejections:
    """Rejections written to `stream`; memory holds counts, the first of each reason, and some missing images."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._reasons: Counter[str] = Counter()
        self._firsts: dict[str, RejectedRow] = {}
        self._missing: list[str] = []
        self.kinds: Counter[str] = Counter()

    def add(self, rejection: RejectedRow) -> None:
        """List a row."""
        self.kinds[rejection.kind] += 1
        reason = _PARTICULARS.sub("…", rejection.reason)
        if reason in self._firsts or len(self._firsts) < _MAX_REASONS:
            self._firsts.setdefault(reason, rejection)
            self._reasons[reason] += 1
        if _is_missing(rejection) and len(self._missing) < _MAX_IMAGES:
            self._missing.append(rejection.image)
        fields = {name: value for name, value in asdict(rejection).items() if name != "image" or value}
        # ASCII, because a rejected row's text may not be encodable.
        self._stream.write(json.dumps(fields) + "\n")

    def diagnosis(self, fitting: Callable[[Sequence[str]], str]) -> str:
        """The reason for most rejections, by example, with advice; else the first one's; '' if there are none.

        `fitting`: gives advice on missing images from their names.
        """
        if not self._reasons:
            return ""
        reason, count = self._reasons.most_common(1)[0]
        first = self._firsts[reason]
        if 2 * count <= self.kinds.total():
            first = next(iter(self._firsts.values()))
            return f"the first: {_described(first)}"
        advice = fitting(self._missing) if _is_missing(first) else ""
        share = "all" if count == self.kinds.total() else "most"
        return f"{share} for one reason, as in {_described(first)}" + (f": {advice}" if advice else "")


def _is_missing(rejection: RejectedRow) -> bool:
    return bool(rejection.image) and rejection.kind != "undecodable image"


def _described(rejection: RejectedRow) -> str:
    return f"{rejection.file} row {rejection.row}: {rejection.reason}"
