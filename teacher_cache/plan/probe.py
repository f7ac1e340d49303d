"""A short measurement of a capture: the real engine over samples spread evenly over the set.

Shape suffixes: S samples that were captured.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavamod_offline.errors import CacheError
from llavamod_offline.progress import ProgressBar
from teacher_cache.capture.shard import capture_rows
from teacher_cache.capture_setup import CaptureSetup, with_preset
from teacher_cache.config import PRESETS
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.engines.registry import ENGINES
from teacher_cache.format.manifest import MANIFEST_NAME, cache_content, canonical, job_content, shard_entry
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.inspection.summary import shard_parts
from teacher_cache.write.store import write_shard

_ROUND_BATCHES = 4  # batches captured between two checks of the clock
_PRESET_IDS = 2**24  # most top-k ids to capture for a preset, since they are held in memory


@dataclass(frozen=True)
class ProbedRun:
    """The result of capturing `samples` samples, and the seconds it took."""

    samples: int
    captured: list[SequenceRecord]
    rejected: int
    seconds: float

    def positions(self, total: int) -> tuple[int, float]:
        """Their positions, and the relative standard error of an estimate for `total` samples from these."""
        by_key: Counter[str] = Counter()
        for item in self.captured:
            by_key[item.key] += len(item.records)
        positions_S = np.array([*by_key.values(), *[0] * (self.samples - len(by_key))])
        fraction = self.samples / total
        variance = float(positions_S.var(ddof=1)) / self.samples * (1 - fraction) if fraction < 1 < self.samples else 0
        return int(positions_S.sum()), float(variance**0.5 / positions_S.mean())


def even_rows(total: int, wanted: int) -> list[int]:
    """`wanted` numbers below `total`, evenly spaced; all of them if `total` is no larger."""
    count = min(total, wanted)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def probe(job: CaptureSetup, engine: CaptureEngine, *, samples: int, batch_size: int, seconds: float) -> ProbedRun:
    """Capture up to `samples` samples, in rounds that are evenly spaced too, until `seconds` have passed.

    An untimed batch first warms up the device. Errors: `CacheError` if no sequence could be captured.
    """
    rows = even_rows(len(job.samples), samples)
    rounds = -(-len(rows) // (_ROUND_BATCHES * batch_size))
    captured: list[SequenceRecord] = []
    rejected = []
    spent, done = 0.0, 0
    capture_rows(job, engine, rows[:batch_size])
    with ProgressBar("probe", len(rows), "sample", also="positions") as bar:
        for first in range(rounds):
            started = time.perf_counter()
            records, refused = capture_rows(job, engine, rows[first::rounds], bar.advance)
            spent += time.perf_counter() - started
            done += len(rows[first::rounds])
            captured += records
            rejected += refused
            if spent >= seconds:
                break
    if not captured:
        raise CacheError(f"plan: none of {done} samples could be captured; the first: {rejected[0].reason}")
    return ProbedRun(done, captured, len(rejected), spent)


def preset_bytes(job: CaptureSetup, engine: CaptureEngine, run: ProbedRun, *, seconds: float) -> dict[str, int]:
    """The bytes of the whole cache with each preset, from captures of about `seconds` each with the loaded weights.

    Presets that the engine cannot capture are left out.
    """
    positions = sum(len(item.records) for item in run.captured)
    found = {}
    for name, preset in PRESETS.items():
        if ENGINES[job.engine].listed and (preset.tail_samples_max or preset.temperatures):
            continue
        variant, other = with_preset(job, preset), copy.copy(engine)
        other.settings = variant.settings
        few = min(seconds / run.seconds, _PRESET_IDS / (positions * variant.settings.top_k), 1.0)
        rows = even_rows(len(job.samples), max(int(run.samples * few), 1))
        if captured := capture_rows(variant, other, rows)[0]:
            found[name] = sum(whole_cache(variant, captured, len(rows)).parts.values())
    return found


@dataclass(frozen=True)
class WholeCache:
    """The bytes of each part of a cache, the seconds of writing it, the bytes of cache.json, and a shard's files."""

    parts: dict[str, int]
    seconds: float
    index_bytes: int
    shard_files: int


def whole_cache(job: CaptureSetup, captured: Sequence[SequenceRecord], samples: int) -> WholeCache:
    """What a cache of the whole set takes, scaled from `samples`.

    An empty shard shows what every shard costs; the rest grows with the number of samples.
    """
    names, share = job.samples.shard_names, len(job.samples) / samples
    sizes, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="cache-teacher-plan-") as scratch:
        for some in ([], captured):
            folder = Path(scratch) / str(len(some))
            folder.mkdir()
            started = time.perf_counter()
            write_shard(folder, names[0], some, [], job.codec)
            seconds.append(time.perf_counter() - started)
            content = (folder / MANIFEST_NAME).read_bytes()
            sizes.append(shard_parts(json.loads(content)))
    empty, full = sizes
    own = job_content(job.fingerprint, names)
    entries = [shard_entry(names[0], content, json.loads(content))] * len(names)
    parts = {name: empty.get(name, 0) * len(names) + (size - empty.get(name, 0)) * share for name, size in full.items()}
    index_bytes = len(canonical(cache_content(own, entries, {})))
    parts["metadata"] = full["metadata"] * len(names) + len(canonical(own)) + index_bytes
    rounded = {name: round(size) for name, size in sorted(parts.items(), key=lambda item: -item[1])}
    spent = seconds[0] * len(names) + max(seconds[1] - seconds[0], 0.0) * share
    return WholeCache(rounded, spent, index_bytes, len(json.loads(content)["files"]) + 1)
