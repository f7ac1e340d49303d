"""Reading a cache: look-up by (key, role), and batches of positions decoded into `SparseTargets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from llavamod_offline.losses.targets import SparseTargets
from teacher_cache.chunks import ChunkReader
from teacher_cache.codec import COLUMN_AXES, Axis
from teacher_cache.manifest import (
    CACHE_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    cache_digest,
    read_object,
    sha256_bytes,
    sha256_file,
)
from teacher_cache.record import Records
from teacher_cache.sequences import edges, key_hash, read_sequences
from teacher_cache.targets import sparse_targets

_MEMORY_BYTES = 256 * 2**20
_AXES: tuple[Axis, ...] = ("position", "head", "draw")
_VERIFY = "run `cache-teacher verify`"


@dataclass(frozen=True)
class CachedSequence:
    """What a cache says of one sequence; hashes as hex, log-probs and entropy in nats."""

    key: str
    role: str
    target_hash: str
    content_hash: str
    n_tokens: int
    n_positions: int
    sum_log_prob: float
    mean_entropy: float


def open_cache(path: Path | str) -> TeacherCache:
    """Open a finished cache: small files are read and checked, token-level arrays are not touched.

    Errors: `CacheError` if there is no cache, it is unfinished, of another format version, or a small file is damaged.
    """
    return TeacherCache(Path(path))


class TeacherCache:
    """An open cache. Safe in threads, and in forked or spawned workers, each of which keeps its own decoded chunks.

    `fingerprint` is what it was made from (see `fingerprint.py`); `digest` identifies its whole content;
    `bytes_per_position` counts every file. At most `memory_bytes` of decoded chunks are kept.
    """

    def __init__(self, path: Path, memory_bytes: int = _MEMORY_BYTES) -> None:
        self.path = path
        self._memory_bytes = memory_bytes
        content = _read_cache_file(path)
        self.fingerprint: dict[str, Any] = content["fingerprint"]
        self.digest = str(content["digest"])
        self.totals: dict[str, int] = content["totals"]
        self.positions = int(self.totals["positions"])
        self.shard_names = [str(shard["name"]) for shard in content["shards"]]
        self._tables: list[pa.RecordBatch] = []
        manifests = []
        for shard in content["shards"]:
            table, manifest = self._open_shard(shard)
            self._tables.append(table)
            manifests.append(manifest)
        small = sum(entry["bytes"] for entry in content["files"].values()) + (path / CACHE_NAME).stat().st_size
        self.bytes = int(self.totals["bytes"]) + small
        self._chunks = ChunkReader([self._folder(name) for name in self.shard_names], manifests, memory_bytes)
        self._index()

    def __len__(self) -> int:
        return len(self._hashes)

    def __reduce__(self) -> tuple[Any, ...]:
        return (TeacherCache, (self.path, self._memory_bytes))

    def __contains__(self, item: object) -> bool:
        return isinstance(item, tuple) and len(item) == 2 and self._find(str(item[0]), str(item[1])) is not None

    @property
    def bytes_per_position(self) -> float:
        """All bytes of all files over all positions; 0 where there are none."""
        return self.bytes / self.positions if self.positions else 0.0

    @property
    def vocab_size(self) -> int:
        """The number of ids that the distributions range over."""
        return int(self.fingerprint["capture"]["vocab_size"])

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures whose normalisers are stored."""
        return tuple(float(value) for value in self.fingerprint["capture"]["temperatures"])

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, sorted."""
        found: set[str] = set()
        for table in self._tables:
            found.update(table.column("role").unique().to_pylist())
        return tuple(sorted(found))

    def keys(self, role: str) -> set[str]:
        """The keys of all sequences of one role."""
        found: set[str] = set()
        for table in self._tables:
            found.update(table.filter(pc.equal(table.column("role"), role)).column("key").to_pylist())
        return found

    def sequence(self, key: str, role: str) -> CachedSequence:
        """Look one sequence up. Errors: `CacheError` if it has no record."""
        shard, row = self._locate(key, role)
        entry = self._tables[shard].slice(row, 1).to_pylist()[0]
        return CachedSequence(
            key,
            role,
            entry["target_hash"].hex(),
            entry["content_hash"].hex(),
            entry["n_tokens"],
            entry["n_position"],
            entry["sum_log_prob"],
            entry["mean_entropy"],
        )

    def target_ids(self, key: str, role: str) -> NDArray[np.int64]:
        """The supervised ids of one sequence."""
        return self._column(self._locate(key, role), "target_ids").astype(np.int64)

    def records(self, items: Sequence[tuple[str, str]]) -> Records:
        """Read the records of several sequences, one after another. Errors: `CacheError` if one is not there."""
        places = [self._locate(*item) for item in items]
        shard = places[0][0] if places else 0  # all shards of a cache are encoded alike
        columns = {
            name: np.concatenate([self._chunks.empty(shard, name), *(self._column(place, name) for place in places)])
            for name in COLUMN_AXES
        }
        return self._chunks.codec(shard).decode(columns)

    def targets(self, items: Sequence[tuple[str, str]]) -> SparseTargets:
        """Decode several sequences' positions, one after another, as CPU tensors.

        Errors: `CacheError` if a sequence has no record or a chunk is damaged.
        """
        return sparse_targets(self.records(items), self.temperatures, self.vocab_size)

    def _folder(self, shard_name: str) -> Path:
        return self.path / SHARDS_NAME / shard_name

    def _open_shard(self, shard: dict[str, Any]) -> tuple[pa.RecordBatch, dict[str, Any]]:
        file = self._folder(shard["name"]) / MANIFEST_NAME
        manifest = read_object(file, way_out=_VERIFY)
        if sha256_bytes(file.read_bytes()) != shard["manifest_sha256"]:
            raise CacheError(f"{file}: its checksum is not the one in {CACHE_NAME}: {_VERIFY}")
        table_file = self._folder(shard["name"]) / SEQUENCES_NAME
        if not table_file.is_file() or sha256_file(table_file) != manifest["files"][SEQUENCES_NAME]["sha256"]:
            raise CacheError(f"{table_file}: missing, or its checksum is not the one in {MANIFEST_NAME}: {_VERIFY}")
        return read_sequences(table_file), manifest

    def _index(self) -> None:
        """Sort all key hashes once: look-up is a binary search, and no Python object per sequence is kept."""
        hashes = [table.column("key_hash").to_numpy() for table in self._tables]
        joined = np.concatenate([np.zeros(0, np.uint64), *hashes])
        self._order = np.argsort(joined, kind="stable")
        self._hashes = joined[self._order]
        self._starts = np.cumsum([0, *(len(table) for table in self._tables)])
        self._edges = [{axis: edges(table, axis) for axis in _AXES} for table in self._tables]

    def _find(self, key: str, role: str) -> tuple[int, int] | None:
        wanted = np.uint64(key_hash(key, role))
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            number = int(self._order[at])
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            row = number - int(self._starts[shard])
            table = self._tables[shard]
            if table.column("key")[row].as_py() == key and table.column("role")[row].as_py() == role:
                return shard, row
            at += 1
        return None

    def _locate(self, key: str, role: str) -> tuple[int, int]:
        found = self._find(key, role)
        if found is None:
            raise CacheError(
                f"cache '{self.path}': no record of sample '{key}' ({role}): its rejected.jsonl may say why; "
                "or capture the set that holds it"
            )
        return found

    def _column(self, place: tuple[int, int], name: str) -> NDArray[Any]:
        shard, row = place
        at = self._edges[shard][COLUMN_AXES[name]]
        return self._chunks.slice(shard, name, int(at[row]), int(at[row + 1]))


def _read_cache_file(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CacheError(f"cache '{path}': no such folder: make one with `cache-teacher run`")
    if not (path / CACHE_NAME).is_file():
        if not (path / JOB_NAME).is_file():
            raise CacheError(f"cache '{path}': has no {CACHE_NAME}, so it is no teacher cache: see `cache-teacher run`")
        raise CacheError(
            f"cache '{path}': unfinished ({CACHE_NAME} is missing): run `cache-teacher run` again with the same "
            "settings to finish it"
        )
    content = read_object(path / CACHE_NAME, way_out=_VERIFY)
    if content.get("digest") != cache_digest(content):
        raise CacheError(f"{path / CACHE_NAME}: damaged (its digest is not that of its content): {_VERIFY}")
    return content
