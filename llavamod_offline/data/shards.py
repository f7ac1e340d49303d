"""A packed set: a folder of WebDataset tars that can be opened at once and read at any place.

    {name}-000000.tar …   samples, see `sample.py`; members are read by position, tars are never scanned
    index.arrow           Arrow IPC file, one row a sample, in the order of the tars; opened by memory map
    set.json              format, name, counts, digest, and each shard's samples, size and SHA-256; written last
    rejected.jsonl        the source rows that are not in the set: key, kind, reason, file, row

Columns of the index: `key`; `shard` (ordinal in set.json's list); `content_hash`; `kind` (`conversation` or
`preference`); `n_turns` and `n_images` (of the sample, answers of a preference not counted); `source`; `text_length`
(characters of all texts); `members`: for each file of the sample its `name` (what follows the key and a dot), and the
`offset` and `size` of its bytes in the tar, the JSON first, then the images in order.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from llavamod_offline.data.sample import Sample, sample_from_json
from llavamod_offline.errors import DataError

SET_FORMAT = 1
INDEX_NAME = "index.arrow"
MANIFEST_NAME = "set.json"
REJECTED_NAME = "rejected.jsonl"

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("n_turns", pa.int32(), nullable=False),
        pa.field("n_images", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("text_length", pa.int64(), nullable=False),
        pa.field(
            "members",
            pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])),
            nullable=False,
        ),
    ]
)

# With this many open tars all are let go before another is opened, so that sets of thousands of shards stay below the
# usual limit of descriptors. Threads that open one at the same moment may each go beyond by one.
_MAX_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Shard:
    """One tar of a set: its name without `.tar`, its samples, its size in bytes and its SHA-256 (hex)."""

    name: str
    samples: int
    size: int
    sha256: str


class SampleSet:
    """The samples of a packed set, numbered in set order.

    Reads are positional and share no state, so a set may be used from threads, forked or spawned workers.
    Errors of every method: `DataError` naming the set, the shard and the key.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shards: tuple[Shard, ...], index: pa.Table) -> None:
        self.path = path
        self.manifest = manifest
        self.shards = shards
        self.index = index
        self._ends = list(accumulate(shard.samples for shard in shards))
        self._open_shards: dict[int, _OpenShard] = {}

    @classmethod
    def open(cls, path: Path) -> SampleSet:
        """Open a set folder by its manifest and index; no tar is touched, whatever the size of the set.

        Errors: `DataError` if it is no set, of another format, empty, or its index does not fit its manifest.
        """
        path = Path(path)
        manifest, shards = _read_manifest(path)
        index = _read_index(path)
        if sum(shard.samples for shard in shards) != len(index):
            raise DataError(f"set '{path}': {INDEX_NAME} does not fit {MANIFEST_NAME}: pack the set again")
        if not len(index):
            raise DataError(f"set '{path}': holds no samples; {REJECTED_NAME} there may say why")
        return cls(path, manifest, shards, index)

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SampleSet.open, (self.path,))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over every key and content hash in order: equal sets have equal digests."""
        return str(self.manifest["digest"])

    @cached_property
    def keys(self) -> list[str]:
        """The keys in set order."""
        return [str(key) for key in self.index.column("key").to_pylist()]

    @property
    def shard_names(self) -> list[str]:
        """The names of the tars, without `.tar`, in set order."""
        return [shard.name for shard in self.shards]

    def rows_of(self, shard_name: str) -> range:
        """The rows that lie in a shard."""
        for ordinal, shard in enumerate(self.shards):
            if shard.name == shard_name:
                return range(self._ends[ordinal] - shard.samples, self._ends[ordinal])
        raise DataError(f"set '{self.path}': has no shard '{shard_name}'")

    def row_of(self, key: str) -> int:
        """The row of a key."""
        row = self._rows_by_key.get(key)
        if row is None:
            raise DataError(f"set '{self.path}': has no sample '{key}'")
        return row

    def read(self, row: int, *, verify: bool = False) -> Sample:
        """Read one sample; `verify` also recomputes its content hash."""
        if not 0 <= row < len(self):
            raise DataError(f"set '{self.path}': has no row {row}: it holds {len(self)} samples")
        entry = self.index.slice(row, 1).to_pylist()[0]
        key, ordinal = str(entry["key"]), bisect_right(self._ends, row)
        where = f"set '{self.path}', shard '{self.shards[ordinal].name}', sample '{key}'"
        content, *images = (
            self._read_bytes(ordinal, member["offset"], member["size"], f"{where}, member '{member['name']}'")
            for member in entry["members"]
        )
        try:
            sample = sample_from_json(key, content, tuple(images))
        except DataError as error:
            raise DataError(f"{where}: {error}: pack the set again") from error
        if verify and sample.content_hash != entry["content_hash"]:
            raise DataError(f"{where}: its content is not what was packed: pack the set again")
        return sample

    @cached_property
    def _rows_by_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def _read_bytes(self, ordinal: int, offset: int, size: int, where: str) -> bytes:
        shard = self._open_shard(ordinal)  # this reference keeps it open until the bytes are here
        content = os.pread(shard.descriptor, size, offset)
        if len(content) != size:
            raise DataError(f"{where}: {len(content)} of its {size} bytes are there: pack the set again")
        return content

    def _open_shard(self, ordinal: int) -> _OpenShard:
        open_shards = self._open_shards
        shard = open_shards.get(ordinal)
        if shard is None:
            if len(open_shards) >= _MAX_OPEN_SHARDS:
                # A reader in another thread keeps its own reference until it is done; nothing is closed under it.
                open_shards = self._open_shards = {}
            shard = open_shards[ordinal] = _OpenShard(self.path, self.shards[ordinal])
        return shard


class _OpenShard:
    """An open tar; its descriptor is used by position only, so that sharing it with a forked process does no harm."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.descriptor = -1
        file = folder / f"{shard.name}.tar"
        try:
            self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"set '{folder}', shard '{shard.name}': {error.strerror}: pack the set again") from error
        size = os.fstat(self.descriptor).st_size
        if size != shard.size:
            raise DataError(
                f"set '{folder}', shard '{shard.name}': {size} bytes instead of {shard.size}: pack the set again"
            )

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _read_manifest(path: Path) -> tuple[dict[str, Any], tuple[Shard, ...]]:
    file = path / MANIFEST_NAME
    if not path.is_dir():
        raise DataError(f"set '{path}': no such folder: make one with `llavamod-offline pack`")
    if not file.is_file():
        raise DataError(f"set '{path}': has no {MANIFEST_NAME}, so it is no packed set: see `llavamod-offline pack`")
    try:
        manifest = json.loads(file.read_bytes())
        found = manifest["format"]
        if found != SET_FORMAT:
            raise DataError(f"set '{path}': format {found}, this version reads {SET_FORMAT}: pack the set again")
        shards = tuple(
            Shard(str(entry["name"]), int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))
            for entry in manifest["shards"]
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"set '{path}': {MANIFEST_NAME} cannot be read: {error!r}") from error
    return manifest, shards


def _read_index(path: Path) -> pa.Table:
    file = path / INDEX_NAME
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"set '{path}': {INDEX_NAME} cannot be read: {error}: pack the set again") from error
    if not table.schema.equals(INDEX_SCHEMA):
        raise DataError(f"set '{path}': {INDEX_NAME} has other columns than this version's: pack the set again")
    return table
