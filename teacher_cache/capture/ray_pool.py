"""A capture by several workers on Ray: each captures whole shards, and another takes over those of a dead one.

Ray's own `max_restarts` and `max_task_retries` do not replace this: they would charge a worker's death to both of its
shards, so that the shard that kills workers could not be named.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import re
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, redirect_stdout
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO, cast

from llavamod_offline.errors import ConfigError, LlavaModError, ModelError
from llavamod_offline.storage.folders import LocalFolder, open_folder
from teacher_cache.capture.pipeline import ShardCounts
from teacher_cache.capture.ray_worker import CaptureWorker, WorkerReport
from teacher_cache.engines.registry import engine_module

if TYPE_CHECKING:
    from teacher_cache.capture.shard import Progress
    from teacher_cache.config import CacheTeacherConfig

_LOG = logging.getLogger(__name__)
_DEATHS = 3  # of workers by one shard; without any shard, as often for each worker
_SHARDS_AT_ONCE = 2  # of a worker: one for its teacher, one that is read or written
_CONNECT_SECONDS = 10.0
_STORE_BYTES = 2**27  # of Ray's object store, through which next to nothing goes
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayPool:
    """Workers on the cluster at RAY_ADDRESS, or on one of its own on this machine; leave the context to end it.

    `config` is the run's, its device and a worker's share of the cluster decided.
    Errors: `ConfigError` if Ray is not installed, the cluster cannot be reached, or settings do not fit it.
    """

    def __init__(
        self, config: CacheTeacherConfig, allow: Sequence[str], worker: type[CaptureWorker] = CaptureWorker
    ) -> None:
        self._ray = _import_ray()
        self._allow = tuple(allow)
        self._class = worker
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}
        self._idle_deaths = 0
        self._address = os.environ.get("RAY_ADDRESS")
        self._config = config
        self._stack = ExitStack()

    def __enter__(self) -> RayPool:
        self._stack.enter_context(redirect_stdout(cast("TextIO", _WithoutRay(sys.stdout))))
        if self._address:
            self._connect(address=self._address)
        self.config = self._resolved(self._config)
        return self

    def __exit__(self, *_: object) -> None:
        with redirect_stdout(io.StringIO()):  # what Ray has held back to say it once
            self._ray.shutdown()
        self._stack.close()

    def start(self, shards: int) -> None:
        """Start as many workers as fit, at most one a shard, and wait until one has loaded its teacher.

        Errors: those of loading it; `ModelError` if workers die of it.
        """
        engine = self.config.engine
        if not self._address:
            own = len(os.sched_getaffinity(0))
            cpus = max(own, (engine.ray_workers or 1) * engine.cpus_per_worker)
            gpus = None if engine.gpus_per_worker else 0
            self._connect(address="local", num_cpus=cpus, num_gpus=gpus, object_store_memory=_STORE_BYTES)
        for _ in range(min(engine.ray_workers or self._places(), shards)):
            self._add()
        _LOG.info("ray: %d workers", len(self._workers))
        while not any(worker.ready for worker in self._workers):
            self._wait()

    def capture(self, names: Sequence[str], progress: Progress) -> Generator[ShardCounts]:
        """Have all shards captured and committed; yields each when it is, in any order.

        A shard that a worker died with is given to another, alone, so that the one that kills is known.
        Errors: those of any worker; `ModelError` naming a shard that has killed its worker for the third time.
        """
        waiting, suspects = deque(names), deque[str]()
        deaths: Counter[str] = Counter()
        samples = positions = left = 0
        shown = (0, 0)
        left = len(names)
        while left:
            self._assign(waiting, suspects)
            worker, outcome = self._wait()
            if isinstance(outcome, ShardCounts):
                left -= 1
                samples += outcome.samples
                positions += outcome.positions
                yield outcome
            elif worker.dead:
                suspects += worker.shards
                deaths.update(worker.shards)
                _check_deaths(deaths)
            here = [live.progress() for live in self._workers]
            now = (samples + sum(pair[0] for pair in here), positions + sum(pair[1] for pair in here))
            progress(now[0] - shown[0], now[1] - shown[1])
            shown = now

    def _assign(self, waiting: deque[str], suspects: deque[str]) -> None:
        """Give out shards: one to each worker, then a second one to each while there are more shards than workers."""
        ready = [worker for worker in self._workers if worker.ready]
        for worker in ready:
            if suspects and not worker.shards:
                self._give(worker, suspects.popleft(), alone=True)
        for held in range(_SHARDS_AT_ONCE):
            for worker in ready:
                enough = len(waiting) > (len(self._workers) if held else 0)
                if enough and len(worker.shards) == held and not worker.alone:
                    self._give(worker, waiting.popleft(), alone=False)

    def _give(self, worker: _Worker, name: str, *, alone: bool) -> None:
        worker.shards.append(name)
        worker.alone = alone
        self._calls[worker.actor.capture.remote(name)] = worker

    def _wait(self) -> tuple[_Worker, ShardCounts | None]:
        """Wait for an answer of any worker; gives it, and the shard that it has finished, if it has."""
        (call,), _ = self._ray.wait(list(self._calls), num_returns=1)
        worker = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError:
            raise  # a defect, with its traceback
        except self._ray.exceptions.RayError:
            self._bury(worker)
            return worker, None
        if isinstance(answer, LlavaModError):
            raise answer
        if isinstance(answer, ShardCounts):
            worker.shards.remove(answer.name)
            worker.alone = False
            self._idle_deaths = 0
            return worker, answer
        if isinstance(answer, WorkerReport):
            worker.report = answer
            for line in answer.lines:
                _LOG.warning("worker %d: %s", worker.number, line)
        worker.ready = True
        self._calls[worker.actor.report.remote()] = worker
        return worker, None

    def _add(self) -> None:
        engine = self.config.engine
        actor = (
            self._ray.remote(self._class)
            .options(
                num_cpus=engine.cpus_per_worker,
                num_gpus=engine.gpus_per_worker,
                max_concurrency=_SHARDS_AT_ONCE + 1,
            )
            .remote(_anywhere(self.config), self._allow)
        )
        worker = _Worker(actor, number=len(self._workers))
        self._workers.append(worker)
        self._calls[actor.open.remote()] = worker

    def _bury(self, worker: _Worker) -> None:
        """Put another worker in the place of a dead one. Errors: `ModelError` if they die of nothing that we know."""
        worker.dead = True
        self._calls = {call: other for call, other in self._calls.items() if other is not worker}
        self._ray.kill(worker.actor)  # it may only be out of reach
        self._workers.remove(worker)
        held = f"with {', '.join(worker.shards)}" if worker.shards else "without a shard"
        _LOG.warning("ray: a worker died %s: another one takes its place", held)
        self._idle_deaths += not worker.shards
        if self._idle_deaths >= _DEATHS * (len(self._workers) + 1):
            raise ModelError(
                f"ray: {self._idle_deaths} workers died before they had a shard: the teacher may need more memory than "
                "there is: see Ray's logs, give workers more, or start fewer with engine.ray_workers"
            )
        self._add()

    def _places(self) -> int:
        """How many workers fit on the cluster."""
        engine = self.config.engine
        there = self._ray.cluster_resources()
        needs = {"CPU": engine.cpus_per_worker, "GPU": engine.gpus_per_worker}
        fits = {name: int(there.get(name, 0) / amount) for name, amount in needs.items() if amount}
        for name, places in fits.items():
            if not places:
                raise ConfigError(
                    f"config: engine.{name.lower()}s_per_worker is {needs[name]:g}, the cluster has "
                    f"{there.get(name, 0):g} in all: lower it, or set device=cpu"
                )
        return min(fits.values())

    def _resolved(self, config: CacheTeacherConfig) -> CacheTeacherConfig:
        device = config.device
        if device == "auto":
            if self._address:
                has_gpu = self._ray.cluster_resources().get("GPU", 0) > 0
            else:
                import torch

                has_gpu = torch.cuda.is_available()
            device = "cuda" if has_gpu else "cpu"
        elif ":" in device:
            raise ConfigError(f"config: device is '{device}': on Ray every worker has GPUs of its own: set device=cuda")
        gpus = config.engine.gpus_per_worker
        if gpus is None:
            gpus = 0 if device == "cpu" else engine_module(config.engine.kind).gpus(config.engine.vllm)
        engine = dataclasses.replace(config.engine, gpus_per_worker=float(gpus))
        return dataclasses.replace(config, device=device, engine=engine)

    def _connect(self, **where: Any) -> None:
        os.environ.update(_QUIET)
        try:
            _check_listening(where["address"])
            self._ray.init(**where, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"ray: no cluster at {where['address']}: {reason}: set RAY_ADDRESS to one that runs (and "
                "RAY_AUTH_MODE=token if it wants one), or unset it"
            ) from error


class _WithoutRay:
    """Standard output, but for what Ray's listener prints there whenever a worker dies: we say so ourselves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, unless Ray does."""
        return len(text) if threading.current_thread().name.startswith("ray_") else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Worker:
    """A worker as its driver sees it; `alone`: it gets no second shard beside the one that it has."""

    def __init__(self, actor: Any, number: int) -> None:
        self.actor = actor
        self.number = number
        self.ready = False
        self.dead = False
        self.alone = False
        self.shards: list[str] = []
        self.report = WorkerReport({}, {}, [])

    def progress(self) -> tuple[int, int]:
        """Samples and positions of the shards that it has not finished, as far as it has told."""
        counts = (self.report.samples, self.report.positions)
        samples, positions = (sum(count.get(name, 0) for name in self.shards) for count in counts)
        return samples, positions


def _check_listening(address: str) -> None:
    """Refuse a host and port at which nobody listens: Ray would try for minutes. Errors: `OSError`."""
    place = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address)
    if place:
        socket.create_connection((place[1], int(place[2])), timeout=_CONNECT_SECONDS).close()


def _check_deaths(deaths: Counter[str]) -> None:
    for name, count in deaths.items():
        if count >= _DEATHS:
            raise ModelError(
                f"shard '{name}': {count} workers died with it: if memory ran out, lower batch_size or "
                "engine.ray_workers, and run again to resume"
            )


def _anywhere(config: CacheTeacherConfig) -> CacheTeacherConfig:
    """The settings with paths that mean the same in other working folders."""

    def absolute(where: str) -> str:
        folder = open_folder(where)
        return str(folder.path.resolve()) if isinstance(folder, LocalFolder) else folder.where

    return dataclasses.replace(
        config,
        data=absolute(config.data),
        teacher=absolute(config.teacher),
        output=absolute(config.output),
    )


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("config: engine.ray needs Ray: pip install 'llavamod-offline[ray]'") from error
    return ray
