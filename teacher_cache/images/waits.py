"""How long a teacher had to wait, and for what."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

Cause = Literal["images", "reading", "writing"]


class Waits:
    """Counts the seconds in which a teacher had nothing to do, by cause.

    `images`: being prepared; `reading`: the next shard, being read and tokenized; `writing`: the shard before the last.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(get_args(Cause), 0.0)

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())

    def add(self, cause: Cause, seconds: float) -> None:
        """Count some seconds."""
        self.seconds[cause] += seconds

    @contextmanager
    def waiting(self, cause: Cause) -> Iterator[None]:
        """Count the seconds that the block takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[cause] += time.monotonic() - began

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """The seconds added since `before`, an earlier copy of `seconds`."""
        return {cause: seconds - before[cause] for cause, seconds in self.seconds.items()}
