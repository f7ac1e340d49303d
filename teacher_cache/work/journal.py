"""What workers have committed, for `status`: a list that each worker keeps, in files of up to 1,000 shards.

    CACHE/.work/done/WORKER-N.json    {"SHARD": [sequences, positions, rejected, bytes], …}

Only the display of progress depends on these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from llavamod_offline.storage.folders import Folder
from teacher_cache.format.manifest import MANIFEST_NAME, SHARDS_NAME, parse_object, shard_entry
from teacher_cache.work.heartbeat import WORK_NAME, read_present

_DONE = f"{WORK_NAME}/done"
_FILE_SHARDS = 1000


class DoneShard(NamedTuple):
    """The counts of a committed shard."""

    sequences: int
    positions: int
    rejected: int
    bytes: int


class Journal:
    """The list of one worker."""

    def __init__(self, folder: Folder, worker: str) -> None:
        self._folder = folder
        self._worker = worker
        self._shards: dict[str, DoneShard] = {}
        self._files = 0

    def add(self, name: str) -> DoneShard:
        """Add a committed shard; returns its counts."""
        (done,) = read_counts(self._folder, [name])
        self.note_all({name: done})
        return done

    def note_all(self, shards: Mapping[str, DoneShard]) -> None:
        """Add shards whose counts are known."""
        self._shards.update(shards)
        file = f"{_DONE}/{self._worker}-{self._files}.json"
        self._folder.write(file, json.dumps(self._shards, ensure_ascii=False, indent=0).encode())
        if len(self._shards) >= _FILE_SHARDS:
            self._shards, self._files = {}, self._files + 1


def read_journals(folder: Folder) -> dict[str, DoneShard]:
    """The counts of all shards that workers have listed; a damaged list counts as none."""
    names = [f"{_DONE}/{name}" for name in folder.names(_DONE) if not name.startswith(".")]
    found: dict[str, DoneShard] = {}
    for content in read_present(folder, names):
        with suppress(ValueError, TypeError, AttributeError):
            listed: Mapping[str, Any] = json.loads(content) if content else {}
            found.update({name: DoneShard(*counts) for name, counts in listed.items()})
    return found


def read_counts(folder: Folder, names: Iterable[str]) -> list[DoneShard]:
    """The counts of committed shards, from their manifests. Errors: `CacheError` if one is damaged, `OSError`."""
    wanted = list(names)
    contents = folder.read_all(f"{SHARDS_NAME}/{name}/{MANIFEST_NAME}" for name in wanted)
    found = []
    for name, content in zip(wanted, contents, strict=True):
        manifest = parse_object(content, f"{folder.where}/{SHARDS_NAME}/{name}", way_out="run `cache-teacher verify`")
        entry = shard_entry(name, content, manifest)
        found.append(DoneShard(*(int(entry[field]) for field in DoneShard._fields)))
    return found
