"""What a capture did."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llavamod_offline.errors import CacheError
from teacher_cache.format.manifest import cache_bytes

if TYPE_CHECKING:
    from teacher_cache.capture.rejection_limit import Reason, Rejected
    from teacher_cache.format.rejection import Rejection
    from teacher_cache.write.store import CacheStore


@dataclass(frozen=True)
class Summary:
    """What a run did.

    `sequences`, `positions`, `rejected` and `reasons` (why) are this run's; the rest is the whole cache's.
    """

    output: str
    complete: bool
    shards_done: int
    shards_total: int
    sequences: int
    positions: int
    rejected: int
    seconds: float
    positions_per_second: float
    bytes_per_position: float | None
    digest: str | None
    totals: dict[str, int] | None
    reasons: list[Reason] = field(default_factory=list)

    @property
    def all_captured(self) -> bool:
        """Whether neither this run nor, once it is complete, the cache has rejected sequences."""
        return not (self.rejected or (self.totals or {}).get("rejected"))


class Tally:
    """Counts what a run captures, from its start."""

    def __init__(self, rejected: Rejected) -> None:
        self.sequences = self.positions = 0
        self.rejected = rejected
        self._started = time.perf_counter()

    def add(self, sequences: int, positions: int, rejected: Iterable[Rejection]) -> None:
        """Count what was captured, and what was rejected."""
        self.sequences += sequences
        self.positions += positions
        self.rejected.add(sequences, rejected)

    def summary(self, store: CacheStore, output: str) -> Summary:
        """Complete the cache if it has all shards. Errors: `CacheError` if no sequence could be captured."""
        left = store.missing()
        cache = store.finalise() if not left else None
        if cache is not None and not cache["totals"]["sequences"]:
            raise CacheError(f"{output}: no sequence could be captured: see the reasons in {output}/rejected.jsonl")
        seconds, total = time.perf_counter() - self._started, len(store.job["shards"])
        return Summary(
            output=output,
            complete=cache is not None,
            shards_done=total - len(left),
            shards_total=total,
            sequences=self.sequences,
            positions=self.positions,
            rejected=self.rejected.count,
            seconds=round(seconds, 3),
            positions_per_second=round(self.positions / seconds, 1),
            bytes_per_position=round(cache_bytes(cache) / max(cache["totals"]["positions"], 1), 3) if cache else None,
            digest=cache["digest"] if cache else None,
            totals=cache["totals"] if cache else None,
            reasons=self.rejected.reasons(),
        )
