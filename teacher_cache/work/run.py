"""`cache-teacher work`: one of any number of workers that capture a set into one cache, without a server.

A worker claims shards one at a time (`claims.py`), signals that it is alive (`heartbeat.py`), and takes over the shards
of workers that died. Workers may come and go at any time; the cache is the same as one that a single process makes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llavamod_offline.config import dump_config
from llavamod_offline.errors import ConfigError, LlavaModError, StorageError, first_line
from llavamod_offline.grace import Grace
from llavamod_offline.models.device import pick_device
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.lock import check_unlocked
from teacher_cache.capture.pipeline import capture_shards
from teacher_cache.capture.rejection_limit import Rejected
from teacher_cache.capture.summary import Summary, Tally
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.engines.registry import gpus_of
from teacher_cache.fingerprint import check_allowed
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.work.claims import Claims, ShardHistory
from teacher_cache.work.heartbeat import RENEWALS_PER_LEASE, WORK_NAME, Heartbeat, Watch
from teacher_cache.work.journal import Journal
from teacher_cache.work.shard_queue import ShardQueue
from teacher_cache.write.store import CacheStore, begun_fingerprint

SETTINGS_NAME = f"{WORK_NAME}/settings.yaml"
LEASE_SECONDS = 60.0
GRACE_SECONDS = 20.0

_LOG = logging.getLogger(__name__)
_FAILED_SHARDS = 3  # in a row, after which a worker blames itself


@dataclass(frozen=True)
class WorkSummary:
    """What a worker did, and the shards that are given up, with the last reason of each."""

    worker: str
    capture: Summary
    failed: dict[str, str]


def work(
    config: CacheTeacherConfig,
    *,
    allow: Sequence[str] = (),
    lease_seconds: float = LEASE_SECONDS,
    grace_seconds: float = GRACE_SECONDS,
    load: Callable[[CaptureSetup], CaptureEngine] = CaptureSetup.load,
) -> WorkSummary:
    """Capture shards of a set until every shard is in the cache or has failed too often.

    Other workers take a shard over if this one does not renew its claims for `lease_seconds`. On SIGTERM the shard in
    hand is finished if that takes at most `grace_seconds`, else released.
    Errors: as `run_capture`; a shard's error, if the shard is not to blame: it is a bug, or three shards in a row
    failed here.
    """
    if config.output_set is not None:
        raise ConfigError("output_set belongs to `cache-teacher generate`: remove it, or run that command")
    for name, given in (("engine.ray", config.engine.ray), ("slice", config.part != (0, 1))):
        if given:
            raise ConfigError(f"config: {name}: workers share the shards by themselves: remove it, or use `run`")
    pick_device(config.device)
    tally = Tally(Rejected())
    setup = prepare_capture(**follow_template(config.setup_values, begun_fingerprint(config.output)))
    check_allowed(allow, setup.fingerprint)
    store = CacheStore.open(config.output, setup.fingerprint, setup.samples.shard_names, allow=allow)
    with ExitStack() as stack:
        grace = stack.enter_context(Grace(grace_seconds))
        heartbeat = stack.enter_context(Heartbeat(store.folder, lease_seconds))
        heartbeat.tell(gpus=_gpus(config, setup), attempts=config.capture.attempts)
        check_unlocked(config.output)  # only now that we are visible: a command that locks it looks for workers
        stack.enter_context(keeping(lambda: store.kept))
        store.start()
        for part in ("claims", "workers", "done"):
            store.folder.clear_leftovers(f"{WORK_NAME}/{part}/*")
        store.folder.create(SETTINGS_NAME, dump_config(_anywhere(config)).encode())
        worker = _FleetWorker(setup, store, heartbeat, tally, config.capture.attempts, config.max_rejected)
        stack.callback(worker.release)
        failed = worker.work(load, grace)
        return WorkSummary(heartbeat.worker, tally.summary(store, config.output), failed)


class _FleetWorker:
    """Captures what it can claim; also the sink that claimed shards are committed to (`pipeline.ShardSink`)."""

    def __init__(
        self,
        setup: CaptureSetup,
        store: CacheStore,
        heartbeat: Heartbeat,
        tally: Tally,
        attempts: int,
        max_rejected: float | None,
    ) -> None:
        self._setup, self._store, self._heartbeat, self._tally = setup, store, heartbeat, tally
        self._max_rejected = max_rejected
        self._claims = Claims(store.folder, heartbeat.worker)
        self._journal = Journal(store.folder, heartbeat.worker)
        lease = heartbeat.lease_seconds
        self._pause = lease / RENEWALS_PER_LEASE
        names, watch = setup.samples.shard_names, Watch(store.folder, lease)
        self._queue = ShardQueue(store, names, self._claims, watch, heartbeat.worker, attempts=attempts)
        self._failed_here: list[str] = []

    def work(self, load: Callable[[CaptureSetup], CaptureEngine], grace: Grace) -> dict[str, str]:
        """Work until nothing is left; returns the shards that were given up, with the last reason of each."""
        if not self._store.missing():
            if not self._store.complete:
                self._rejected_so_far().check(self._store.folder.where, last=True)
            return {}
        limited = self._rejected_so_far()  # a worker that was restarted goes on counting
        limited.check(self._store.folder.where)
        engine, output = load(self._setup), self._store.folder.where
        total = sum(map(len, map(self._setup.samples.rows_of, self._store.missing())))
        with ProgressBar("capture", total, "sample", also="positions") as bar:
            while True:
                self._heartbeat.tell(state="capturing")
                began = time.monotonic()

                def advance(samples: int, positions: int) -> None:
                    nonlocal began
                    now = time.monotonic()
                    self._heartbeat.count(samples=samples, positions=positions, capturing_seconds=now - began)
                    self._heartbeat.tell(waited_seconds=round(self._setup.waits.total, 3))
                    bar.advance(samples, positions)
                    began = now

                shards = capture_shards(
                    self._setup, engine, self, self._names(), advance, grace=grace, failed=self._failed
                )
                with closing(shards):
                    for done in shards:
                        self._tally.add(done.sequences, done.positions, done.rejected, done.seconds, done.waited)
                        limited.add(done.sequences, done.rejected)
                        limited.check(output)
                if self._queue.left != "waiting":
                    break
                self._heartbeat.tell(state="waiting")
                time.sleep(self._pause)
        self._rejected_so_far().check(output, last=True)
        return {name: _last_reason(history) for name, history in self._queue.failed.items()}

    def _rejected_so_far(self) -> Rejected:
        """What all workers have rejected; nothing without a limit."""
        limited = Rejected(self._max_rejected)
        if self._max_rejected is not None:
            limited.add(*self._store.outcomes())
        return limited

    def commit(
        self, name: str, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], codec: Codec
    ) -> None:
        """Commit a claimed shard, unless another worker has taken it over."""
        try:
            if not self._claims.is_mine(name):
                _LOG.warning("shard %s: another worker has taken it over: this copy is dropped", name)
                self._claims.drop(name)
                return
            self._store.commit(name, captured, rejected, codec)
            self._journal.add(name)
            self._claims.clear(name)
        except (LlavaModError, OSError) as error:
            self._failed(name, error)
        else:
            self._failed_here.clear()
            self._heartbeat.count(shards=1)
        self._heartbeat.tell(holds=self._claims.held)

    def release(self) -> None:
        """Give up what is claimed, for others to take at once."""
        for name in self._claims.held:
            with suppress(OSError, StorageError):  # the claim ends with its lease
                self._claims.end(name, "released")

    def _names(self) -> Iterable[str]:
        for name in self._queue.take():
            self._heartbeat.tell(holds=self._claims.held)
            yield name

    def _failed(self, name: str, error: Exception) -> None:
        """Record that a shard failed. Errors: the same one, if it is a bug or seems to be the worker's own fault."""
        _LOG.warning("shard %s: failed: %s", name, first_line(error))
        self._claims.end(name, "failed", f"{type(error).__name__}: {first_line(error)}")
        self._failed_here.append(name)
        if not isinstance(error, LlavaModError | OSError) or len(set(self._failed_here)) >= _FAILED_SHARDS:
            raise error


def _last_reason(history: ShardHistory) -> str:
    failures = history.failures
    return failures[-1].reason if failures else f"{history.latest} workers died while they captured it"


def _gpus(config: CacheTeacherConfig, setup: CaptureSetup) -> float:
    """The GPUs that this worker keeps busy."""
    if not setup.device.startswith("cuda"):
        return 0.0
    return float(gpus_of(config.engine.kind, config.engine.vllm))


def _anywhere(config: CacheTeacherConfig) -> CacheTeacherConfig:
    """The settings, with paths that are valid in any working folder."""

    def absolute(where: str) -> str:
        return str(Path(where).resolve()) if os.path.exists(where) else where

    return replace(config, data=absolute(config.data), teacher=absolute(config.teacher))
