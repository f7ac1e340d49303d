"""`cache-teacher run`: a packed set and a teacher → a cache, shard by shard, resumable at any time."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.models.device import pick_device
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.lock import LOCK_NAME, locked
from teacher_cache.capture.pipeline import capture_shards
from teacher_cache.capture.rejection_limit import Reason, Rejected
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.fingerprint import check_allowed
from teacher_cache.format.manifest import cache_bytes
from teacher_cache.write.store import CacheStore, begun_fingerprint

_LOG = logging.getLogger(__name__)


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


def run_capture(
    config: CacheTeacherConfig,
    *,
    allow: Sequence[str] = (),
    load: Callable[[CaptureSetup], CaptureEngine] = CaptureSetup.load,
) -> Summary:
    """Capture every shard of the set that the cache lacks, and complete the cache once it has all.

    `allow` names fingerprint fields that may differ from those of an unfinished cache. `load` gives the engine, if any
    shard is to be captured in this process.
    Errors: `ConfigError` if another process writes the cache, or this slice of it; a `LlavaModError` before anything
    is written, if set, teacher, settings and existing cache do not fit together; later only if disk or device memory
    runs out, a shard kills workers on Ray, or more is rejected than `max_rejected` allows. The cache can always be
    resumed.
    """
    if config.output_set is not None:
        raise ConfigError("output_set belongs to `cache-teacher generate`: remove it, or run that command")
    if not config.engine.ray:  # Ray's workers have devices of their own
        pick_device(config.device)
    part, parts = config.part
    name = LOCK_NAME if parts == 1 else f"{LOCK_NAME}-{part}-of-{parts}"  # slices run side by side
    with locked(config.output, name):
        return _capture(config, allow, load)


def _capture(
    config: CacheTeacherConfig, allow: Sequence[str], load: Callable[[CaptureSetup], CaptureEngine]
) -> Summary:
    """Capture what is missing; see `run_capture`."""
    started = time.perf_counter()
    sequences = positions = 0
    rejected = Rejected()
    with ExitStack() as stack:
        pool, output, ray = None, config.output, config.engine
        values = follow_template(config.setup_values, begun_fingerprint(output))
        if ray.ray:
            from teacher_cache.capture.ray_pool import RayPool

            workers, cpus, gpus = ray.ray_workers, ray.cpus_per_worker, ray.gpus_per_worker
            pool = stack.enter_context(RayPool(values, output, allow, workers=workers, cpus=cpus, gpus=gpus))
            values = pool.values
        setup = prepare_capture(**values)
        check_allowed(allow, setup.fingerprint)
        store = CacheStore.open(output, setup.fingerprint, setup.samples.shard_names, allow=allow)
        stack.enter_context(keeping(lambda: store.kept))
        part, parts = config.part
        mine = setup.samples.shard_names[part::parts]
        lacking = set(store.missing())
        missing = [name for name in mine if name in lacking]
        limited = Rejected(config.max_rejected)
        if config.max_rejected is not None and (lacking or not store.complete):
            limited.add(*store.outcomes([name for name in mine if name not in lacking]))
            limited.check(output, last=not missing)
        if missing:
            _LOG.info("%s: %d of %d shards to capture", output, len(missing), len(setup.samples.shard_names))
            if pool is not None:
                pool.start(len(missing))
                capture = pool.capture
            else:
                capture = functools.partial(capture_shards, setup, load(setup), store)
        store.start()
        if missing:
            progress = stack.enter_context(
                ProgressBar("capture", sum(map(len, map(setup.samples.rows_of, missing))), "sample", also="positions")
            )
            for done in stack.enter_context(closing(capture(missing, progress.advance))):
                sequences, positions = sequences + done.sequences, positions + done.positions
                for tally in (rejected, limited):
                    tally.add(done.sequences, done.rejected)
                limited.check(output)
            limited.check(output, last=True)
    left = store.missing()
    cache = store.finalise() if not left else None
    if cache is not None and not cache["totals"]["sequences"]:
        raise CacheError(f"{output}: no sequence could be captured: see the reasons in {output}/rejected.jsonl")
    seconds = time.perf_counter() - started
    return Summary(
        output=output,
        complete=cache is not None,
        shards_done=len(setup.samples.shard_names) - len(left),
        shards_total=len(setup.samples.shard_names),
        sequences=sequences,
        positions=positions,
        rejected=rejected.count,
        seconds=round(seconds, 3),
        positions_per_second=round(positions / seconds, 1),
        bytes_per_position=round(cache_bytes(cache) / max(cache["totals"]["positions"], 1), 3) if cache else None,
        digest=cache["digest"] if cache else None,
        totals=cache["totals"] if cache else None,
        reasons=rejected.reasons(),
    )
