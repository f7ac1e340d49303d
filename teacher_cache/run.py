"""`cache-teacher run`: a packed set and a teacher → a cache, shard by shard, resumable at any moment."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from llavamod_offline.errors import CacheError
from teacher_cache.capture import capture_rows
from teacher_cache.engines import load_engine
from teacher_cache.fingerprint import check_allowed
from teacher_cache.job import prepare_job
from teacher_cache.manifest import cache_bytes
from teacher_cache.store import CacheStore

if TYPE_CHECKING:
    from teacher_cache.config import CacheConfig

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run did. `sequences`, `positions` and `rejected` are this run's; the rest is the whole cache's."""

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


def run_job(config: CacheConfig, *, allow: Sequence[str] = ()) -> Summary:
    """Capture every shard of the set that the cache lacks, and finish the cache once all are there.

    `allow` names fingerprint fields that may differ from those of an unfinished cache.
    Errors: a `LlavaModError` before anything is written, if set, teacher and settings do not fit one another or the
    cache that is there; later only if the disk or the device's memory gives out. The cache can always be resumed.
    """
    started = time.perf_counter()
    job = prepare_job(config)
    output = config.output
    check_allowed(allow, job.fingerprint)
    store = CacheStore.open(output, job.fingerprint, job.samples.shard_names, allow=allow)
    part, parts = config.part
    mine = set(job.samples.shard_names[part::parts])
    missing = [name for name in store.missing() if name in mine]
    engine = load_engine(job, config) if missing else None
    store.start()
    counts = dict.fromkeys(("sequences", "positions", "rejected"), 0)
    if engine is not None:
        _LOG.info("%s: %d of %d shards to capture", output, len(missing), len(job.samples.shard_names))
        with _Progress(sum(len(job.samples.rows_of(name)) for name in missing)) as progress:
            for name in missing:
                captured, rejected = capture_rows(job, engine, job.samples.rows_of(name), progress.update)
                store.commit(name, captured, rejected, job.codec)
                counts["sequences"] += len(captured)
                counts["positions"] += sum(len(item.records) for item in captured)
                counts["rejected"] += len(rejected)
    left = store.missing()
    cache = store.finalise() if not left else None
    if cache is not None and not cache["totals"]["sequences"]:
        raise CacheError(f"{output}: not one sequence could be captured: {output}/rejected.jsonl has the reasons")
    seconds = time.perf_counter() - started
    return Summary(
        output=output,
        complete=cache is not None,
        shards_done=len(job.samples.shard_names) - len(left),
        shards_total=len(job.samples.shard_names),
        **counts,
        seconds=round(seconds, 3),
        positions_per_second=round(counts["positions"] / seconds, 1),
        bytes_per_position=round(cache_bytes(cache) / max(cache["totals"]["positions"], 1), 3) if cache else None,
        digest=cache["digest"] if cache else None,
        totals=cache["totals"] if cache else None,
    )


class _Progress:
    """A bar over samples that also shows positions per second."""

    def __init__(self, samples: int) -> None:
        self._bar = tqdm(total=samples, unit="sample", desc="capture", disable=not sys.stderr.isatty())
        self._positions = 0
        self._started = time.perf_counter()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, samples: int, positions: int) -> None:
        """Count finished samples and positions."""
        self._positions += positions
        rate = self._positions / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} positions/s", refresh=False)
        self._bar.update(int(samples))
