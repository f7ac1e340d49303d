"""A short measurement of a capture: the real engine over a few samples, evenly spaced over the set.

Many samples are tokenised first, which costs little and says how many positions and tokens the set has. Some of them
are then captured in batches of like length, as a run does it, until the time is up; what was captured is written into a
cache that is thrown away. Shape suffixes: N samples that are tokenised.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, DataError
from teacher_cache.capture.shard import capture_rows
from teacher_cache.capture_setup import CaptureSetup, with_preset
from teacher_cache.config import PRESETS
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.format.manifest import MANIFEST_NAME
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.inspection.summary import shard_parts
from teacher_cache.read.reader import open_cache
from teacher_cache.write.store import CacheStore, write_shard

_SHARD = "probe"
_SCRATCH = "cache-teacher-plan-"
_TOKENISED = 8  # times the samples that are captured
_PRESET_IDS = 2**24  # most ids in the heads that are captured for a preset
# Bytes of each part of the files: for a shard, and for each position in it (`sequences`: for each sequence).
Parts = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Lengths:
    """What the N tokenised samples come to: of each its row, its captured sequences, positions and tokens, and how many
    of its sequences were rejected. `tokens_N` is that of the longest sequence, times their number."""

    rows_N: NDArray[np.int64]
    sequences_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    tokens_N: NDArray[np.int64]
    rejected_N: NDArray[np.int64]


@dataclass(frozen=True)
class ProbedRun:
    """What was captured of the probe and what it took, in seconds and bytes; `rejected`: what tokenising let pass.

    `token_seconds`: of one token in a padded batch. `write_seconds`: of a shard, and of each position in it.
    `cache_bytes`: of what a cache has besides its shards.
    """

    samples: int
    sequences: int
    positions: int
    rejected: int
    seconds: float
    token_seconds: float
    write_seconds: tuple[float, float]
    parts: Parts
    cache_bytes: int


def even_rows(total: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` numbers below `total`, evenly spaced; all of them if there are no more."""
    count = min(total, wanted)
    return ((np.arange(count) + 0.5) * total / count).astype(np.int64)


def measure_lengths(job: CaptureSetup, samples: int, *, seconds: float) -> Lengths:
    """Tokenise 8 · `samples` evenly spaced samples of the set; fewer if `seconds` are up, but at least `samples`."""
    started = time.perf_counter()
    rows = even_rows(len(job.samples), _TOKENISED * samples)
    table: list[tuple[int, ...]] = []
    for number in scattered(len(rows)):
        table.append(_sample_lengths(job, job.samples, int(rows[number])))
        if len(table) >= samples and time.perf_counter() - started > seconds:
            break
    return Lengths(*np.array(sorted(table), np.int64).reshape(-1, 5).T)


def measure(
    job: CaptureSetup, engine: CaptureEngine, lengths: Lengths, *, samples: int, batch_size: int, seconds: float
) -> ProbedRun:
    """Capture `samples` evenly spaced ones of those tokenised, batch by batch, at least one batch, for about `seconds`.

    One batch before them is not counted: it starts libraries and device.
    Errors: `CacheError` if not one sequence could be captured.
    """
    batches = _batches(lengths, samples, batch_size)
    captured: list[SequenceRecord] = []
    rejected: list[Rejection] = []
    spent = tokens = 0.0
    done = known = 0
    if batches:
        capture_rows(job, engine, lengths.rows_N[batches[0]].tolist())
    for batch in batches:
        started = time.perf_counter()
        records, refused = capture_rows(job, engine, lengths.rows_N[batch].tolist())
        spent += time.perf_counter() - started
        tokens += padded_tokens(lengths, batch)
        captured += records
        rejected += refused
        done += len(batch)
        known += int(lengths.rejected_N[batch].sum())
        if spent >= seconds:
            break
    if not captured:
        reason = f": {rejected[0].reason}" if rejected else ": all are rejected, see max_length"
        raise CacheError(f"plan: not one of {len(lengths.rows_N)} samples could be captured{reason}")
    measured = {"samples": done, "rejected": len(rejected) - known, "seconds": spent, "token_seconds": spent / tokens}
    return _written(job, captured, rejected, measured)


def measure_presets(
    job: CaptureSetup, engine: CaptureEngine, lengths: Lengths, *, samples: int, batch_size: int, seconds: float
) -> dict[str, Parts]:
    """The parts of what each preset would keep, by the same weights, in about `seconds` each.

    Of heads that may hold a whole vocabulary few samples are captured.
    """
    found = {}
    for name, preset in PRESETS.items():
        variant = with_preset(job, preset)
        other = copy.copy(engine)
        other.settings = variant.settings
        few = int(_PRESET_IDS / variant.settings.top_k / max(float(lengths.positions_N.mean()), 1.0))
        captured: list[SequenceRecord] = []
        started = time.perf_counter()
        for batch in _batches(lengths, max(1, min(samples, few)), batch_size):
            captured += capture_rows(variant, other, lengths.rows_N[batch].tolist())[0]
            if time.perf_counter() - started >= seconds and captured:
                break
        if captured:
            found[name] = _parts(variant, captured)
    return found


def _batches(lengths: Lengths, samples: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Batches of like length of `samples` evenly spaced usable ones, in an order whose beginnings are even, too."""
    usable = np.flatnonzero(lengths.sequences_N)
    chosen = usable[even_rows(len(usable), samples)] if len(usable) else usable
    by_length = chosen[np.argsort(lengths.tokens_N[chosen], kind="stable")]
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return [batches[number] for number in scattered(len(batches))]


def padded_tokens(lengths: Lengths, batch: NDArray[np.int64]) -> float:
    """The tokens of a batch as the engine pads it: its longest sample's, for each."""
    return float(lengths.tokens_N[batch].max() * len(batch)) if len(batch) else 0.0


def all_padded_tokens(lengths: Lengths, batch_size: int) -> float:
    """The tokens of all samples in padded batches of like length."""
    order_N = np.argsort(lengths.tokens_N, kind="stable")
    order_N = order_N[lengths.sequences_N[order_N] > 0]
    return sum(padded_tokens(lengths, order_N[at : at + batch_size]) for at in range(0, len(order_N), batch_size))


def scattered(count: int) -> list[int]:
    """0 … count − 1 in an order whose every beginning is spread evenly: bits reversed (van der Corput)."""
    bits = max(count - 1, 0).bit_length()
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) if bits else 0 for number in range(2**bits))
    return [number for number in reversed_bits if number < count]


def _sample_lengths(job: CaptureSetup, samples: SampleSet, row: int) -> tuple[int, int, int, int, int]:
    sample = samples.read(row, scattered=True)
    sequences = []
    for role in sample.roles:
        try:
            sequences.append(job.encode(sample, role))
        except DataError:  # counted below; a run would write it down
            continue
    kept = job.fingerprint["capture"]["positions"]
    positions = sum(len(sequence.rows_and_targets(kept)[0]) for sequence in sequences)
    longest = max((len(sequence.input_ids_T) for sequence in sequences), default=0)
    return row, len(sequences), positions, longest * len(sequences), len(sample.roles) - len(sequences)


def _written(
    job: CaptureSetup, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection], measured: Mapping[str, float]
) -> ProbedRun:
    """Write what was captured into a cache that is thrown away."""
    parts = _parts(job, captured)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder:
        seconds = [_commit(job, Path(folder) / "one", captured[:1], [])]
        seconds.append(_commit(job, Path(folder) / "all", captured, rejected))
        cache = open_cache(Path(folder) / "all")
    return ProbedRun(
        samples=int(measured["samples"]),
        sequences=len(captured),
        positions=cache.positions,
        rejected=int(measured["rejected"]),
        seconds=measured["seconds"],
        token_seconds=measured["token_seconds"],
        write_seconds=_line(seconds, [len(captured[0].records), cache.positions]),
        parts=parts,
        cache_bytes=cache.bytes - cache.totals["bytes"],
    )


def _parts(job: CaptureSetup, captured: Sequence[SequenceRecord]) -> Parts:
    """Write a shard of one sequence and a shard of all, to be thrown away: what a shard costs, and each unit in it."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder:
        sizes = []
        for name, some in (("one", captured[:1]), ("all", captured)):
            (Path(folder) / name).mkdir()
            write_shard(Path(folder) / name, _SHARD, some, [], job.codec)
            sizes.append(shard_parts(json.loads((Path(folder) / name / MANIFEST_NAME).read_bytes())))
    positions = [len(captured[0].records), sum(len(item.records) for item in captured)]
    units = {"sequences": [1, len(captured)]}
    return {name: _line([sizes[0].get(name, 0), size], units.get(name, positions)) for name, size in sizes[1].items()}


def _line(values: Sequence[float], units: Sequence[int]) -> tuple[float, float]:
    """What a shard costs and what each unit in it costs, from a shard of few units and one of many."""
    if units[1] <= units[0]:
        return 0.0, values[1] / max(units[1], 1)
    each = max(values[1] - values[0], 0.0) / (units[1] - units[0])
    return max(values[0] - each * units[0], 0.0), each


def _commit(job: CaptureSetup, path: Path, captured: Sequence[SequenceRecord], rejected: Sequence[Rejection]) -> float:
    store = CacheStore.open(path, job.fingerprint, [_SHARD])
    store.start()
    started = time.perf_counter()
    store.commit(_SHARD, captured, rejected, job.codec)
    seconds = time.perf_counter() - started
    store.finalise()
    return seconds
