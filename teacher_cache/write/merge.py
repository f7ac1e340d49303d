"""`cache-teacher merge`: merge finished caches over different data, shard by shard, without decoding.

Shards are hard-linked where possible, else copied. A shard whose name is already used is renamed, also in its manifest;
all other files stay byte-identical. An interrupted merge resumes where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.progress import track
from llavamod_offline.signals import keeping
from llavamod_offline.storage.folders import open_folder
from llavamod_offline.storage.lock import locked
from llavamod_offline.storage.walk import walk_files
from teacher_cache.fingerprint import check_allowed, check_read_alike, differences
from teacher_cache.format.manifest import MANIFEST_NAME, SHARDS_NAME, canonical
from teacher_cache.read.reader import TeacherCache
from teacher_cache.write.store import CacheStore


@dataclass(frozen=True)
class Merged:
    """The result of a merge. `renamed`: the new name of each renamed shard, by `CACHE/NAME`."""

    output: str
    caches: int
    shards: int
    sequences: int
    positions: int
    bytes: int
    digest: str
    renamed: dict[str, str]


def merge_caches(caches: Sequence[TeacherCache], output: str, *, allow: Sequence[str] = ()) -> Merged:
    """Merge finished caches in the given order.

    Their fingerprints must be equal except for `data` and the fields in `allow`; of these the merged fingerprint lists
    all values. `data.digest` is the list of the caches' digests, `data.samples` their sum.
    Errors: `CacheError` listing the differing fields, or naming the first (key, role) that two caches share;
    `ConfigError` for a field that cannot be allowed; the errors of writing a cache.
    """
    if len(caches) < 2:
        raise ConfigError("merge: pass at least two caches")
    with locked(output):
        return _merge(caches, output, allow)


def _merge(caches: Sequence[TeacherCache], output: str, allow: Sequence[str]) -> Merged:
    """Merge the caches; see `merge_caches`."""
    _check_fingerprints(caches, allow)
    _check_keys(caches)
    shards = list(named_shards(caches))
    store = CacheStore.open(output, merged_fingerprint([cache.fingerprint for cache in caches]), [s[2] for s in shards])
    store.start()
    missing = set(store.missing())
    with keeping(lambda: store.kept):
        for cache, name, new_name in track(shards, "merge", "shard"):
            if new_name in missing:
                _copy_shard(cache, name, store, new_name)
        content = store.finalise()
    return Merged(
        output=output,
        caches=len(caches),
        shards=len(shards),
        sequences=content["totals"]["sequences"],
        positions=content["totals"]["positions"],
        bytes=content["totals"]["bytes"],
        digest=content["digest"],
        renamed={f"{cache.path}/{name}": new_name for cache, name, new_name in shards if name != new_name},
    )


def merged_fingerprint(fingerprints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fingerprint of a merged cache."""
    merged: dict[str, Any] = _common(fingerprints)
    digests = [fingerprint["data"]["digest"] for fingerprint in fingerprints]
    merged["data"] = {
        "digest": [part for digest in digests for part in (digest if isinstance(digest, list) else [digest])],
        "samples": sum(fingerprint["data"]["samples"] for fingerprint in fingerprints),
        **{name: value for name, value in merged["data"].items() if name not in ("digest", "samples", "shards")},
    }
    return merged


def _common(values: Sequence[Any]) -> Any:
    """The value if all are equal (field by field in sections), else the list of distinct values in order."""
    if all(isinstance(value, Mapping) for value in values):
        fields = dict.fromkeys(field for value in values for field in value)
        return {field: _common([value.get(field) for value in values]) for field in fields}
    different = [value for number, value in enumerate(values) if value not in values[:number]]
    return different[0] if len(different) == 1 else different


def _check_fingerprints(caches: Sequence[TeacherCache], allow: Sequence[str]) -> None:
    check_allowed(allow, *(cache.fingerprint for cache in caches))
    first = caches[0]
    for other in caches[1:]:
        sides = (first.fingerprint, other.fingerprint)
        found = differences(*sides, allow=[*allow, "data"], names=(f"'{first.path}'", f"'{other.path}'"))
        if found:
            raise CacheError(
                f"merge: the caches have different settings: {'; '.join(found)}: "
                "capture one of them again, or pass --allow FIELD for a difference that you know to be harmless"
            )
        check_read_alike(*sides)


def _check_keys(caches: Sequence[TeacherCache]) -> None:
    """Refuse a sequence that two caches share. Errors: `CacheError` naming the first, in the later cache's order."""
    for number, cache in enumerate(caches):
        for earlier in caches[:number]:
            twice = {(key, role) for role in cache.roles for key in earlier.keys(role) & cache.keys(role)}
            if twice:
                key, role = next(item for item in cache.items() if item in twice)
                raise CacheError(
                    f"merge: sample '{key}' ({role}) is in cache '{earlier.path}' and in '{cache.path}', with "
                    f"{len(twice) - 1} more: a cache holds each sequence once: capture the sets with different keys"
                )


def named_shards(caches: Sequence[TeacherCache]) -> Iterator[tuple[TeacherCache, str, str]]:
    """Every shard with its cache, its name there, and its name in the merged cache: the same if unused."""
    every = {name for cache in caches for name in cache.shard_names}
    taken: set[str] = set()
    for cache in caches:
        for name in cache.shard_names:
            new_name, number = name, 1
            while new_name in taken or (number > 1 and new_name in every):
                number += 1
                new_name = f"{name}_{number}"
            taken.add(new_name)
            yield cache, name, new_name


def _copy_shard(cache: TeacherCache, name: str, store: CacheStore, new_name: str) -> None:
    source = open_folder(cache.path)
    try:
        with (
            source.copied(f"{SHARDS_NAME}/{name}") as there,
            store.folder.commit(f"{SHARDS_NAME}/{new_name}", MANIFEST_NAME) as here,
        ):
            for inside in walk_files(there):
                file, target = there / inside, here / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                if name != new_name and file == there / MANIFEST_NAME:
                    target.write_bytes(canonical({**json.loads(file.read_bytes()), "name": new_name}))
                else:
                    _link(file, target)
    except FileExistsError:
        return  # another process merging the same caches was faster
    except OSError as error:
        raise CacheError(
            f"shard '{name}' of cache '{cache.path}': cannot be copied: {error.strerror or error}: "
            "free disk space or fix permissions, then merge again to resume"
        ) from error


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(file, target)
