"""A stand-in for a capture: writes prepared records through the store, many times faster than a teacher could."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from teacher_cache.engines.make_records import make_records
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.write.store import CacheStore

CODEC = Codec(30, (2.0,), "exact", 8, 4)
FINGERPRINT = {"capture": {"vocab_size": 30, "temperatures": [2.0]}, "data": {"digest": "d" * 64}}
NAMES = ["s-0", "s-1", "s-2", "s-3"]


@functools.cache
def captured(name: str) -> list[SequenceRecord]:
    """The sequences of a shard, with zero, one and two positions."""
    found = []
    for number in range(3):
        key = f"{name}-{number}"
        logits = torch.randn(number, 30, generator=torch.Generator().manual_seed(len(key) + number))
        uniforms = torch.from_numpy(sequence_uniforms(0, key, "response", number))
        records, _ = make_records(logits, torch.arange(number), uniforms, RecordSettings(0.9, 8, 4, 20.0, (2.0,)))
        target_hash = hashlib.sha256(records.target_ids_N.astype("<i8").tobytes()).hexdigest()
        found.append(SequenceRecord(key, "response", target_hash, "cd" * 32, 7, records))
    return found


def rejected(name: str) -> list[Rejection]:
    """What a shard could not capture."""
    return [Rejection(f"{name}-bad", "response", "no such ünicode\nimage")]


def write_cache(where: Path | str, shards: int = 2, part: tuple[int, int] = (0, 1)) -> str | None:
    """Do what a run does: open, start, commit the missing shards of its slice, finish once all are committed.

    Return the digest, or None if shards are still missing.
    """
    names = NAMES[:shards]
    store = CacheStore.open(where, FINGERPRINT, names)
    mine = set(names[part[0] :: part[1]])
    missing = [name for name in store.missing() if name in mine]
    store.start()
    for name in missing:
        store.commit(name, captured(name), rejected(name), CODEC)
    return None if store.missing() else str(store.finalise()["digest"])
