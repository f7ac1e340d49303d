"""What a capture did."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llavamod_offline.errors import CacheError
from teacher_cache.format.manifest import cache_bytes

if TYPE_CHECKING:
    from teacher_cache.capture.rejection_limit import Reason, Rejected
    from teacher_cache.format.rejection import Rejection
    from teacher_cache.write.store import CacheStore

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run did.

    `sequences`, `positions`, `rejected`, `reasons` (why) and the shares of its time that the teacher spent waiting, in
    total and by cause, are this run's; the rest is the whole cache's.
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
    waiting_share: float | None = None
    waiting_shares: dict[str, float] = field(default_factory=dict)

    @property
    def all_captured(self) -> bool:
        """Whether neither this run nor, once it is complete, the cache has rejected sequences."""
        return not (self.rejected or (self.totals or {}).get("rejected"))


class Tally:
    """Counts what a run captures, from its start."""

    def __init__(self, rejected: Rejected) -> None:
        self.sequences = self.positions = 0
        self.rejected = rejected
        self._seconds = 0.0
        self._waited: Counter[str] = Counter()
        self._started = time.perf_counter()

    def add(
        self,
        sequences: int,
        positions: int,
        rejected: Iterable[Rejection],
        seconds: float = 0.0,
        waited: Mapping[str, float] | None = None,
    ) -> None:
        """Count what was captured and rejected, the teacher's time, and the part of it spent waiting, by cause."""
        self._seconds += seconds
        self._waited.update(waited or {})
        self.sequences += sequences
        self.positions += positions
        self.rejected.add(sequences, rejected)

    def summary(self, store: CacheStore, output: str) -> Summary:
        """Complete the cache if it has all shards. Errors: `CacheError` if no sequence could be captured."""
        left = store.missing()
        cache = store.finalise() if not left else None
        if cache is not None and not cache["totals"]["sequences"]:
            raise CacheError(f"{output}: no sequence could be captured: see the reasons in {output}/rejected.jsonl")
        shares = {cause: round(spent / self._seconds, 4) for cause, spent in self._waited.items() if self._seconds}
        share = round(self._waited.total() / self._seconds, 4) if self._seconds else None
        if share is not None:
            by_cause = ", ".join(f"{cause} {part:.1%}" for cause, part in shares.items()) or "never"
            _LOG.info("%s: the teacher waited %.1f%% of its time (%s)", output, 100 * share, by_cause)
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
            waiting_share=share,
            waiting_shares=shares,
        )
