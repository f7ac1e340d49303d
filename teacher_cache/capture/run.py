"""`cache-teacher run`: a packed set and a teacher → a cache, shard by shard, resumable at any time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from llavamod_offline.errors import ConfigError
from llavamod_offline.grace import Grace
from llavamod_offline.models.device import pick_device
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.lock import LOCK_NAME, locked
from teacher_cache.capture.pipeline import capture_shards
from teacher_cache.capture.rejection_limit import Rejected
from teacher_cache.capture.summary import Summary, Tally
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.fingerprint import check_allowed
from teacher_cache.work.claims import clear_claims, histories
from teacher_cache.work.heartbeat import check_no_workers
from teacher_cache.write.store import CacheStore, begun_fingerprint

_LOG = logging.getLogger(__name__)


def run_capture(
    config: CacheTeacherConfig,
    *,
    allow: Sequence[str] = (),
    load: Callable[[CaptureSetup], CaptureEngine] = CaptureSetup.load,
    grace_seconds: float = 0.0,
) -> Summary:
    """Capture every shard of the set that the cache lacks, and complete the cache once it has them all.

    `allow` names fingerprint fields that may differ from those of an unfinished cache. `load` loads the engine, if this
    process has any shard to capture. On SIGTERM the shard in hand is finished if that takes at most `grace_seconds`.
    Errors: `ConfigError` if another process writes the cache, or this slice of it; a `LlavaModError` before anything
    is written, if set, teacher, settings and existing cache do not fit together; later only if disk or device memory
    runs out, a shard kills workers on Ray, or more is rejected than `max_rejected` allows. The cache can always be
    resumed.
    """
    if config.output_set is not None:
        raise ConfigError("output_set belongs to `cache-teacher generate`: remove it, or run that command")
    if config.engine.ray and grace_seconds:
        raise ConfigError("--grace: Ray's workers finish no shards when a run is stopped: remove it, or engine.ray")
    if not config.engine.ray:  # Ray's workers have devices of their own
        pick_device(config.device)
    part, parts = config.part
    name = LOCK_NAME if parts == 1 else f"{LOCK_NAME}-{part}-of-{parts}"  # slices run side by side
    with locked(config.output, name), Grace(grace_seconds) as grace:
        check_no_workers(config.output)
        return _capture(config, allow, load, grace)


def _capture(
    config: CacheTeacherConfig, allow: Sequence[str], load: Callable[[CaptureSetup], CaptureEngine], grace: Grace
) -> Summary:
    """Capture what is missing; see `run_capture`."""
    tally = Tally(Rejected())
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
            limited.add(*store.outcomes(mine))
            limited.check(output, last=not missing)
        if missing:
            _LOG.info("%s: %d of %d shards to capture", output, len(missing), len(setup.samples.shard_names))
            if pool is not None:
                pool.start(len(missing))
                capture = pool.capture
            else:
                capture = functools.partial(capture_shards, setup, load(setup), store, grace=grace)
        store.start()
        if missing:
            progress = stack.enter_context(
                ProgressBar("capture", sum(map(len, map(setup.samples.rows_of, missing))), "sample", also="positions")
            )
            for done in stack.enter_context(closing(capture(missing, progress.advance))):
                tally.add(done.sequences, done.positions, done.rejected, done.seconds, done.waited)
                limited.add(done.sequences, done.rejected)
                limited.check(output)
            clear_claims(store.folder, missing, histories(store.folder))  # of workers that failed before
            limited.check(output, last=True)
    return tally.summary(store, config.output)
