"""Preparing an audit: check that settings and samples match the cache, and draw random sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llavamod_offline.errors import CacheError, ConfigError
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.registry import ENGINES
from teacher_cache.fingerprint import check_allowed, differences
from teacher_cache.format.record import STORED_SETTINGS
from teacher_cache.format.sequences import short_hash
from teacher_cache.read.reader import TeacherCache
from teacher_cache.student.check import check_sequence

_CHECKED = ("tokenizer", "template", "sequence", "images", "teacher")
_LISTS = ("temperatures", "forced_ids")
_OTHERS = ("precision", "positions", "seed")


def captured_as(cache: TeacherCache) -> CaptureConfig:
    """The settings of the capture, except hidden states (not compared) and forced ids (their texts are unknown)."""
    capture = cache.fingerprint["capture"]
    names = (*STORED_SETTINGS, *_OTHERS)
    merged = [STORED_SETTINGS.get(name, name) for name in names if _is_merged(name, capture[name])]
    if merged:
        raise CacheError(
            f"cache '{cache.path}': merged from caches with different capture.{merged[0]}: audit each of those caches"
        )
    return CaptureConfig(
        **{STORED_SETTINGS.get(name, name): capture[name] for name in names if name not in _LISTS},
        temperatures=list(capture["temperatures"]),
        forced_tokens=[],
        mismatched=bool(capture.get("mismatched")),
    )


def check_engine(cache: TeacherCache, kind: str) -> None:
    """Refuse engines that list likely ids alone where the cache holds more. Errors: `ConfigError`."""
    capture = cache.fingerprint["capture"]
    more = {"tail samples": capture["draws_max"], "other temperatures": capture["temperatures"]}
    held = [name for name, there in more.items() if there]
    if ENGINES[kind].listed and held:
        raise ConfigError(
            f"engine.kind={kind} gives only the most likely ids, but cache '{cache.path}' also holds "
            f"{' and '.join(held)}: audit it with engine.kind=hf or vllm"
        )


def _is_merged(name: str, value: Any) -> bool:
    """Whether a field holds the values of several caches: a list, or one of lists."""
    if name in _LISTS:
        return any(isinstance(each, list) for each in value)
    return isinstance(value, list)


def check_settings(cache: TeacherCache, job: CaptureSetup, allow: Sequence[str]) -> list[str]:
    """Refuse settings that differ from the cache's; return allowed differences as notes."""
    check_allowed(allow, cache.fingerprint, job.fingerprint)
    names = ("cache", "now")
    there, here = cache.fingerprint, job.fingerprint
    sides = [{name: side[name] for name in _CHECKED} for side in (there, here)]
    for side, source in zip(sides, (there, here), strict=True):
        side["capture"] = {"vocab_size": source["capture"]["vocab_size"]}
        side["data"] = {"digest": source["data"]["digest"]}
    parts = there["data"]["digest"]
    if isinstance(parts, list) and here["data"]["digest"] in parts:  # one of the sets of a merged cache
        sides[0]["data"] = sides[1]["data"]
    found = differences(*sides, allow=allow, names=names)
    if found:
        raise CacheError(
            f"cache '{cache.path}': was captured with different settings: {'; '.join(found)}: set data, teacher, "
            "template, max_length and image_aspect as in the run, or pass --allow FIELD"
        )
    notes = [f"allowed: {line}" for line in differences(*sides, names=names)]
    engines = [{"engine": side["engine"]} for side in (there, here)]
    return notes + [f"another engine: {line}" for line in differences(*engines, names=names)]


def draw_rows(cache: TeacherCache, job: CaptureSetup, wanted: int, seed: int) -> list[int]:
    """Draw rows of the set with about `wanted` sequences in all, evenly over the cache's shards."""
    rng = np.random.default_rng(seed)
    shards = [rows for rows in cache.shard_rows() if len(rows)]
    order = rng.permutation(len(shards))[:wanted].tolist()
    turns = [(rng.permutation(len(shards[place]))[:wanted] + shards[place].start).tolist() for place in order]
    here = set(job.samples.keys)
    found: dict[str, int] = {}
    count = 0
    for row in (row for turn in itertools.zip_longest(*turns) for row in turn if row is not None):
        ((key, _),) = cache.items([row])
        if count >= wanted:
            break
        if key in here and key not in found:
            found[key] = job.samples.row_of(key)
            count += sum((key, role) in cache for role in cache.roles)
    if not found:
        where = f"set '{job.samples.path}'"
        raise CacheError(f"cache '{cache.path}': {where} has none of its samples: pass the captured set as data=")
    return sorted(found.values())


def check_contents(cache: TeacherCache, job: CaptureSetup, rows: Iterable[int]) -> None:
    """Refuse samples whose content or supervised ids differ from the cache's."""
    for row in rows:
        sample = job.samples.read(row, verify=True)
        for role in sample.roles:
            if (sample.key, role) not in cache:
                continue
            if short_hash(sample.content_hash) != cache.sequence(sample.key, role).content_hash:
                raise CacheError(
                    f"sample '{sample.key}': its content in set '{job.samples.path}' differs from that captured in "
                    f"cache '{cache.path}': pass the captured set as data="
                )
            check_sequence(cache, job.encode(sample, role))
