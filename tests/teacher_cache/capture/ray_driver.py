"""Captures on Ray in a process of their own, with workers that die: `python -c "…; main()" ONCE ALWAYS key=value …`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from llavamod_offline.config import load_config
from llavamod_offline.errors import LlavaModError
from teacher_cache.capture.ray_pool import RayPool
from teacher_cache.capture.ray_worker import CaptureWorker
from teacher_cache.capture_setup import prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.write.store import CacheStore


class Mortal(CaptureWorker):
    """Dies in the middle of shards named in the environment: of one only the first time, of the other always."""

    def _count(self, name: str, samples: int, positions: int) -> None:
        super()._count(name, samples, positions)
        marker = Path(self._output).parent / f"died-of-{name}"
        dies = name == os.environ["ALWAYS"] or (name == os.environ["ONCE"] and not marker.exists())
        if dies and self._samples[name] >= 2:
            with marker.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Capture with mortal workers, the always-killing shard last; print the error and the reported progress."""
    os.environ["ONCE"], os.environ["ALWAYS"], *settings = sys.argv[1:]
    config = load_config(CacheTeacherConfig, (), settings)
    told = [0, 0]

    def progress(samples: int, positions: int) -> None:
        told[0] += samples
        told[1] += positions

    error = ""
    with RayPool(config.setup_values, config.output, (), workers=2, cpus=1, gpus=None, worker=Mortal) as pool:
        job = prepare_capture(**pool.values)
        store = CacheStore.open(config.output, job.fingerprint, job.samples.shard_names)
        store.start()
        fatal = os.environ["ALWAYS"]
        pool.start(2)
        done = list(pool.capture([name for name in store.missing() if name != fatal], progress))
        assert told == [sum(item.samples for item in done), sum(item.positions for item in done)]
        try:
            list(pool.capture([fatal], progress))
        except LlavaModError as failure:
            error = str(failure)
    print(json.dumps({"error": error, "samples": sum(item.samples for item in done)}))
