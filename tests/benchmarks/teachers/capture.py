"""Caches of a world's sequences, made with the product's own code."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from teacher_cache.config import Preset
from teacher_cache.engines.make_records import make_records
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.schema import Codec
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.write.store import CacheStore
from tests.benchmarks.teachers.worlds import World

_Name = TypeVar("_Name", bound=Hashable)


def capture(world: World, presets: Mapping[_Name, Preset], folder: Path) -> dict[_Name, TeacherCache]:
    """Write a cache of all the world's sequences with each preset, and open them."""
    settings = {name: _settings(preset, world.vocab_size) for name, preset in presets.items()}
    captured: dict[_Name, list[SequenceRecord]] = {name: [] for name in presets}
    for number in range(world.sequences):
        rows, key = world.rows(number), f"run-{number:09d}"
        uniforms_N = torch.from_numpy(sequence_uniforms(0, key, "response", len(rows.target_ids_N)))
        digest = hashlib.sha256(key.encode()).hexdigest()
        for name, keep in settings.items():
            records, _ = make_records(rows.log_probs_NV, rows.target_ids_N, uniforms_N, keep)
            captured[name].append(SequenceRecord(key, "response", digest, digest, len(records), records))
    caches = {}
    for place, (name, keep) in enumerate(settings.items()):
        codec = Codec(world.vocab_size, keep.temperatures, presets[name].precision, keep.top_k, keep.tail_samples_max)
        about = {"vocab_size": world.vocab_size, "temperatures": [*keep.temperatures], "temperature": keep.temperature}
        store = CacheStore.open(folder / str(place), {"capture": about}, ["run"])
        store.start()
        store.commit("run", captured[name], [], codec)
        store.finalise()
        caches[name] = open_cache(folder / str(place))
    return caches


def _settings(preset: Preset, vocab_size: int) -> RecordSettings:
    temperatures = tuple(preset.temperatures)
    if preset.temperature not in (1.0, *temperatures):
        temperatures = (*temperatures, preset.temperature)
    return RecordSettings(
        top_p=preset.top_p,
        min_prob=preset.min_prob,
        top_k=min(preset.top_k or vocab_size, vocab_size),
        tail_samples_max=preset.tail_samples_max,
        tail_samples_per_mass=preset.tail_samples_per_mass,
        temperatures=temperatures,
        temperature=preset.temperature,
    )
