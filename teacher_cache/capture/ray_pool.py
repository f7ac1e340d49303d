"""A capture by several workers on Ray: each captures whole shards; a dead worker's shards go to another.

Ray's own `max_restarts` and `max_task_retries` cannot replace this: they would blame a worker's death on both of its
shards, so the shard that kills workers could not be named.
"""

from __future__ import annotations

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
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

from llavamod_offline.errors import ConfigError, LlavaModError, ModelError, first_line
from llavamod_offline.signals import watch_again
from llavamod_offline.storage.folders import absolute
from teacher_cache.capture.pipeline import ShardCounts
from teacher_cache.capture.ray_placing import absolute_values, choose_device, places
from teacher_cache.capture.ray_worker import CaptureWorker, WorkerReport
from teacher_cache.capture.shard import Progress
from teacher_cache.capture_setup import SetupValues

_LOG = logging.getLogger(__name__)
_DEATHS = 3  # allowed per shard; without a shard, per worker
_SHARDS_AT_ONCE = 2  # per worker: one for its teacher, one being read or written
_CONNECT_SECONDS = 10.0
_STORE_BYTES = 2**27  # size of Ray's object store, which is hardly used
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayPool:
    """Workers on the cluster at RAY_ADDRESS, or on this machine; shut down on leaving the context.

    At most `workers` workers (None: as many as fit) rebuild the setup from `values` and write to `output`. Inside the
    context, `values` hold the resolved device, and `gpus` is a worker's number of GPUs. `worker`: a class like
    `CaptureWorker`, whose constructor also takes `more`.
    Errors: `ConfigError` if Ray is not installed, the cluster cannot be reached, or settings do not fit it.
    """

    def __init__(
        self,
        values: SetupValues,
        output: str,
        allow: Sequence[str],
        *,
        workers: int | None,
        cpus: int,
        gpus: float | None,
        worker: type[Any] = CaptureWorker,
        more: Sequence[Any] = (),
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("engine.ray needs Ray: pip install 'llavamod-offline[ray]'") from error
        self.values, self.gpus = values, gpus
        self._ray: Any = ray
        self._output, self._allow, self._class, self._more = output, tuple(allow), worker, tuple(more)
        self._most, self._cpus = workers, cpus
        self._workers: list[_Worker] = []
        self._calls: dict[Any, _Worker] = {}
        self._idle_deaths = 0
        self._address = os.environ.get("RAY_ADDRESS")
        self._stack = ExitStack()

    def __enter__(self) -> RayPool:
        self._stack.enter_context(redirect_stdout(cast("TextIO", _WithoutRay(sys.stdout))))
        if self._address:
            self._connect(address=self._address)
        self._choose_device()
        return self

    def __exit__(self, *_: object) -> None:
        with redirect_stdout(io.StringIO()):  # messages that Ray has held back
            self._ray.shutdown()
        self._stack.close()

    def start(self, shards: int) -> None:
        """Start as many workers as fit, at most one per shard, and wait until one has loaded its teacher.

        Errors: those of loading it; `ModelError` if workers keep dying.
        """
        if not self._address:
            cpus = max(len(os.sched_getaffinity(0)), (self._most or 1) * self._cpus)
            gpus = None if self.gpus else 0
            self._connect(address="local", num_cpus=cpus, num_gpus=gpus, object_store_memory=_STORE_BYTES)
        fits = self._most
        if fits is None or not self._address:  # another cluster may grow
            room = places(self._ray.cluster_resources(), cpus=self._cpus, gpus=self.gpus or 0.0)
            fits = min(fits or room, room)
        for _ in range(min(fits, shards)):
            self._add()
        _LOG.info("ray: %d workers", len(self._workers))
        while not any(worker.ready for worker in self._workers):
            self._wait()

    def capture(self, names: Sequence[str], progress: Progress) -> Generator[ShardCounts]:
        """Capture and commit all shards; yields each when it is done, in any order.

        The shards of a worker that died are given to others one at a time, to find the one that kills workers.
        Errors: those of any worker; `ModelError` naming a shard that has killed its worker for the third time.
        """
        waiting, suspects = deque(names), deque[str]()
        deaths: Counter[str] = Counter()
        samples = positions = 0
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
                for name in worker.shards:
                    if deaths[name] >= _DEATHS:
                        raise ModelError(
                            f"shard '{name}': {deaths[name]} workers died with it: if memory ran out, lower batch_size "
                            "or engine.ray_workers, and rerun to resume"
                        )
            here = [live.progress() for live in self._workers]
            now = (samples + sum(pair[0] for pair in here), positions + sum(pair[1] for pair in here))
            progress(now[0] - shown[0], now[1] - shown[1])
            shown = now

    def _assign(self, waiting: deque[str], suspects: deque[str]) -> None:
        """Assign a shard to each worker, then a second one while more shards than workers are waiting."""
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
        """Wait for a reply from any worker; returns the worker, and the shard that it has finished, if any."""
        (call,), _ = self._ray.wait(list(self._calls), num_returns=1)
        worker = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError:
            raise  # a bug, with its traceback
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
        values, output = absolute_values(self.values), absolute(self._output)
        actor = (
            self._ray.remote(self._class)
            .options(num_cpus=self._cpus, num_gpus=self.gpus, max_concurrency=_SHARDS_AT_ONCE + 1)
            .remote(values, output, self._allow, *self._more)
        )
        worker = _Worker(actor, number=len(self._workers))
        self._workers.append(worker)
        self._calls[actor.open.remote()] = worker

    def _bury(self, worker: _Worker) -> None:
        """Replace a dead worker. Errors: `ModelError` if workers keep dying before they have a shard."""
        worker.dead = True
        self._calls = {call: other for call, other in self._calls.items() if other is not worker}
        self._ray.kill(worker.actor)  # it may only be unreachable
        self._workers.remove(worker)
        held = f"with {', '.join(worker.shards)}" if worker.shards else "without a shard"
        _LOG.warning("ray: a worker died %s: another one takes its place", held)
        self._idle_deaths += not worker.shards
        if self._idle_deaths >= _DEATHS * (len(self._workers) + 1):
            raise ModelError(
                f"ray: {self._idle_deaths} workers died before they had a shard: the teacher may need more memory: "
                "see Ray's logs, or start fewer workers with engine.ray_workers"
            )
        self._add()

    def _choose_device(self) -> None:
        if self._address:
            has_gpu = self._ray.cluster_resources().get("GPU", 0) > 0
        else:
            import torch

            has_gpu = torch.cuda.is_available()
        self.values, self.gpus = choose_device(self.values, self.gpus, has_gpu=has_gpu)

    def _connect(self, **where: Any) -> None:
        os.environ.update(_QUIET)
        try:
            place = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", where["address"])
            if place:  # Ray would retry for minutes where nothing listens
                socket.create_connection((place[1], int(place[2])), timeout=_CONNECT_SECONDS).close()
            self._ray.init(**where, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            watch_again()  # Ray has installed its own SIGTERM handler
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"ray: no cluster at {where['address']}: {first_line(error)}: set RAY_ADDRESS to a running one (and "
                "RAY_AUTH_MODE=token if it needs that), or unset it"
            ) from error


class _WithoutRay:
    """Standard output without what Ray's listener prints when a worker dies, which is logged anyway."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, except for Ray's threads."""
        return len(text) if threading.current_thread().name.startswith("ray_") else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass(eq=False)
class _Worker:
    """A worker as its driver sees it; `alone`: it gets no second shard."""

    actor: Any
    number: int
    ready: bool = False
    dead: bool = False
    alone: bool = False
    shards: list[str] = field(default_factory=list)
    report: WorkerReport = field(default_factory=lambda: WorkerReport({}, {}, []))

    def progress(self) -> tuple[int, int]:
        """Samples and positions of its unfinished shards, as last reported."""
        counts = (self.report.samples, self.report.positions)
        samples, positions = (sum(count.get(name, 0) for name in self.shards) for count in counts)
        return samples, positions
