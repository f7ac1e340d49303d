"""Reading a cache: look-up by (key, role), and batches of positions decoded into `SparseTargets`.

Shape suffixes: Q sequences of a cache, B of them requested at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET, Positions
from llavamod_offline.errors import CacheError
from llavamod_offline.losses.targets import SparseTargets
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.folders import open_folder
from llavamod_offline.storage.remote import RemoteFolder
from teacher_cache.format.columns import ColumnFile
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.manifest import (
    MANIFEST_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    VISUAL_COUNTS,
    cache_bytes,
)
from teacher_cache.format.record import Records, concatenate_records
from teacher_cache.format.sequences import CachedSequence, SequenceRows
from teacher_cache.read.block_cache import BlockReader, Columns, decoded_bytes
from teacher_cache.read.cache_file import read_cache_file
from teacher_cache.read.cache_tail_profile import mean_tail, staged_tail_sums, tail_sums
from teacher_cache.read.key_index import SequenceIndex
from teacher_cache.read.lazy_rows import LazyRows
from teacher_cache.read.shard_files import VERIFY, LocalShards, Manifests, ShardFiles, StagedShards, checked_manifest
from teacher_cache.read.to_targets import sparse_targets
from teacher_cache.visual.advantages import position_weights

__all__ = ["CachedSequence", "TeacherCache", "open_cache"]

# Sequences as (key, role) pairs, or as rows from `TeacherCache.rows`.
Items = Sequence[tuple[str, str]] | NDArray[np.int64]

# Beyond this, sequence tables are opened shard by shard, when first read: 10⁹ samples have 100 GB of them.
_OPENED_BYTES = 2**30
_CAPTURE_ADVANTAGES = "capture it with capture.without_image=blank or drop"
_MEMORY_BYTES = 256 * 2**20
_MOST_MEMORY_BYTES = 2**30


def open_cache(
    where: Path | str, *, staging: DiskCache | None = None, temperature: float | None = None
) -> TeacherCache:
    """Open a finished cache by path or URL: reads and checks small files, not token-level arrays.

    `staging`: where copies of remote files are kept (default: see `llavamod_offline/storage/disk_cache.py`).
    `temperature`: the only one to be used, which makes decoding faster (1 needs no normaliser; None: any).
    If a cache has more than 1 GiB of sequence tables, each is opened and checked when first read.
    Errors: `CacheError` if the cache is missing, unfinished or of another format version, or a small file is damaged;
    `StorageError` if a bucket cannot be read.
    """
    return TeacherCache(where, staging=staging, temperature=temperature)


class TeacherCache:
    """An open cache. Safe in threads, and in forked or spawned workers, each of which keeps its own decoded blocks.

    `path`: its location as text; `fingerprint`: what it was made from (see `fingerprint.py`); `digest` identifies its
    whole content; `bytes_per_position` counts every file. Keeps at most `memory_bytes` of decoded blocks.
    """

    def __init__(
        self,
        where: Path | str,
        memory_bytes: int = _MEMORY_BYTES,
        *,
        staging: DiskCache | None = None,
        temperature: float | None = None,
    ) -> None:
        self._memory_bytes = memory_bytes
        self._temperature = temperature
        self._staging = staging
        self._folder = open_folder(where)
        self.path = self._folder.where
        content, own_bytes = read_cache_file(self._folder)
        self.fingerprint: dict[str, Any] = content["fingerprint"]
        self.digest = str(content["digest"])
        self.totals: dict[str, int] = content["totals"]
        self.positions = int(self.totals["positions"])
        self._shards: list[dict[str, Any]] = content["shards"]
        self.shard_names = [str(shard["name"]) for shard in self._shards]
        self.bytes = cache_bytes(content, own_bytes)
        self._files: ShardFiles
        if isinstance(self._folder, RemoteFolder):
            self._staging = staging or DiskCache()
            self._files = StagedShards(self._folder, self._shards, self.digest, self._staging)
        else:
            self._files = LocalShards(self._folder, self._shards)
        self._rows: Sequence[SequenceRows]
        if sum(int(shard["files"][SEQUENCES_NAME]["bytes"]) for shard in self._shards) <= _OPENED_BYTES:
            self._rows = [SequenceRows(table) for table in self._files.tables()]
        else:
            self._rows = LazyRows(self._files.table, len(self._shards))
        self._index = SequenceIndex(self._rows, [int(shard["sequences"]) for shard in self._shards])
        manifests = Manifests(self._files.folder, self._shards)
        self._blocks = BlockReader(self._files.folder, manifests, memory_bytes, self.temperatures)

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.path, self._memory_bytes, self._staging, self._temperature))

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2):
            return False
        return self._index.find_one(str(item[0]), str(item[1])) >= 0

    @property
    def parts(self) -> tuple[TeacherCache, ...]:
        """The caches that records come from: this one. Of `SeveralCaches`, all of them."""
        return (self,)

    def assigned(self, rows: NDArray[np.int64]) -> list[tuple[TeacherCache, NDArray[np.int64]]]:
        """Each of `parts` with those of the given set rows whose records it provides: here all."""
        return [(self, rows)]

    def owner(self, row: int) -> TeacherCache:
        """The cache that a row of `rows` belongs to."""
        return self

    @property
    def bytes_per_position(self) -> float:
        """Bytes of all files divided by positions; 0 for an empty cache."""
        return self.bytes / self.positions if self.positions else 0.0

    @property
    def vocab_size(self) -> int:
        """The number of ids that the distributions cover."""
        return int(self.fingerprint["capture"]["vocab_size"])

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures whose normalisers are read: all stored ones, or the requested one."""
        stored = tuple(float(value) for value in self.fingerprint["capture"]["temperatures"])
        return stored if self._temperature is None else tuple(value for value in stored if value == self._temperature)

    @property
    def sampled_at(self) -> float:
        """The temperature for which the cache was captured, at which its tails were sampled."""
        return float(self.fingerprint["capture"].get("temperature", 1.0))

    @property
    def has_tail_samples(self) -> bool:
        """Whether any tail was sampled."""
        return int(self.totals["draws"]) > 0

    @functools.cached_property
    def tail_profile(self) -> Tensor | None:
        """The teacher's mean tail over the whole cache, [V] float32, sum 1; None without tails or tail samples.

        Estimated from the tail samples of all positions. Reads two small arrays of every shard, once.
        """
        return mean_tail(self.tail_sums())

    def tail_sums(self) -> NDArray[np.float64]:
        """The estimated mass of every id [V] in the tails of all positions together; reads as `tail_profile` does."""
        if not isinstance(self._folder, RemoteFolder):
            return tail_sums(self._folder, self._shards, self.vocab_size)
        staging = self._staging or DiskCache()
        return staged_tail_sums(self._folder, self._shards, self.vocab_size, digest=self.digest, staging=staging)

    @property
    def positions_kept(self) -> Positions:
        """Which positions of a sequence have records: those that predict its supervised tokens, or all."""
        return "all" if self.fingerprint["capture"].get("positions") == "all" else "response"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, sorted."""
        found: set[str] = set()
        for rows in self._rows:
            found.update(rows.table.column("role").unique().to_pylist())
        return tuple(sorted(found))

    def keys(self, role: str) -> set[str]:
        """The keys of all sequences of one role."""
        found: set[str] = set()
        for table in (rows.table for rows in self._rows):
            found.update(table.filter(pc.equal(table.column("role"), role)).column("key").to_pylist())
        return found

    def rows(self, keys: pa.ChunkedArray, role: str, shards: Mapping[str, range] | None = None) -> NDArray[np.int64]:
        """The rows of the sequences of many keys, in one role; −1 if missing.

        `shards`: where the keys of a set's shards, by name, are among `keys`, which makes the look-up faster.
        """
        numbers = {name: number for number, name in enumerate(self.shard_names)}
        spans = (shards or {}).items()
        return self._index.rows(
            keys, role, ((numbers[name], span.start, span.stop) for name, span in spans if name in numbers)
        )

    @property
    def is_exhaustive(self) -> bool:
        """Whether every record holds all ids, so that there are no tails."""
        return int(self.totals["heads"]) == self.positions * self.vocab_size

    @property
    def is_remote(self) -> bool:
        """Whether the cache is remote."""
        return isinstance(self._folder, RemoteFolder)

    @property
    def shard_bytes(self) -> dict[str, int]:
        """The size of each shard, by its name."""
        return {str(shard["name"]): int(shard["bytes"]) for shard in self._shards}

    @property
    def fits_in_memory(self) -> bool:
        """Whether all decoded records fit into `memory_bytes`, so that any order of reading is equally fast."""
        return sum(self._decoded_bytes()) <= self._memory_bytes

    def keep_shards(self, count: int) -> None:
        """Keep up to `count` decoded shards, within bounds, so that reading them interleaved decodes each once."""
        wanted = sum(sorted(self._decoded_bytes())[-count:])
        self._memory_bytes = max(self._memory_bytes, min(wanted, _MOST_MEMORY_BYTES))
        self._blocks.memory_bytes = self._memory_bytes

    def _decoded_bytes(self) -> list[int]:
        """The approximate memory of each shard's decoded records."""
        return [decoded_bytes(shard, len(self.temperatures)) for shard in self._shards]

    def stage(self, name: str) -> None:
        """Copy a remote shard to this machine before it is read."""
        with self._files.hold(self.shard_names.index(name)):
            pass

    def manifests(self) -> list[dict[str, Any]]:
        """Read every shard's manifest, which lists files and sizes. Errors: `CacheError` if one is damaged."""
        names = [f"{SHARDS_NAME}/{name}/{MANIFEST_NAME}" for name in self.shard_names]
        try:
            contents = self._folder.read_all(names)
        except OSError as error:
            raise CacheError(f"cache '{self.path}': a {MANIFEST_NAME} cannot be read: {error}: {VERIFY}") from error
        return [
            checked_manifest(content, f"{self.path}/{name}", shard)
            for content, name, shard in zip(contents, names, self._shards, strict=True)
        ]

    def items(self, rows: Iterable[int] | None = None) -> list[tuple[str, str]]:
        """(key, role) of the sequences in some rows, or of all, in the order of the cache.

        Rows are numbered across shards; neighbours share decoded blocks, so reading in this order is fast.
        """
        places = map(self._index.place, range(len(self)) if rows is None else rows)
        return [self._rows[shard].item(row) for shard, row in places]

    def numbers(self, name: str) -> NDArray[Any]:
        """`n_tokens`, `n_position`, `sum_log_prob` or `mean_entropy` of all sequences, in the order of the cache."""
        return np.concatenate([np.zeros(0), *(rows.table.column(name).to_numpy() for rows in self._rows)])

    def shard_rows(self) -> list[range]:
        """The rows of each shard's sequences, as `items` takes them."""
        first_rows = self._index.first_rows.tolist()
        return [range(start, stop) for start, stop in itertools.pairwise(first_rows)]

    def sequence(self, key: str, role: str) -> CachedSequence:
        """Look up one sequence. Errors: `CacheError` if it has no record."""
        shard, row = self._index.place(self._find_one(key, role))
        return self._rows[shard].sequence(row)

    def sequences(self, items: Items) -> list[CachedSequence]:
        """Look up several sequences. Errors: `CacheError` if one has no record."""
        shards_B, locals_B = self._index.places(self._find(items))
        return [
            self._rows[shard].sequence(row) for shard, row in zip(shards_B.tolist(), locals_B.tolist(), strict=True)
        ]

    def target_ids(self, key: str, role: str) -> NDArray[np.int64]:
        """The supervised ids of one sequence."""
        ids_N = self.records([(key, role)]).target_ids_N.astype(np.int64)
        supervised_N: NDArray[np.int64] = ids_N[ids_N != NO_TARGET]
        return supervised_N

    def records(self, items: Items) -> Records:
        """Read and concatenate the records of several sequences. Errors: `CacheError` if one has no record."""
        rows_B = self._find(items)
        shards_B, spans_B2 = self._index.spans(rows_B)
        pieces: list[list[Columns]] = [[] for _ in items]
        for shard in np.unique(shards_B).tolist():
            numbers = np.flatnonzero(shards_B == shard).tolist()
            with self._files.hold(shard):
                found = self._blocks.pieces(shard, [spans_B2[number] for number in numbers])
            for number, parts in zip(numbers, found, strict=True):
                pieces[number] = parts
        whole = [part for parts in pieces for part in parts]
        if not whole:
            return concatenate_records([], len(self.temperatures))
        return Records(*(np.concatenate(column) for column in zip(*whole, strict=True)))

    def hidden_states(self, items: Items) -> HiddenStates:
        """Read and concatenate the last hidden states of several sequences, float32.

        Their rows index the positions that `targets` gives for the same sequences. Errors: `CacheError` if the
        cache has no hidden states, or a sequence no record.
        """
        found, before = [], 0
        for columns, start, stop in self._columns(items):
            if columns.hidden is None:
                raise CacheError(f"cache '{self.path}': has no hidden states: capture with capture.hidden=float16")
            states = columns.hidden.read(start, stop)
            found.append(HiddenStates(states.rows_M + before, states.states_MD))
            before += stop - start
        if not found:
            return HiddenStates(np.zeros(0, np.int64), np.zeros((0, 0), np.float32))
        return HiddenStates(
            np.concatenate([part.rows_M for part in found]), np.concatenate([part.states_MD for part in found])
        )

    @property
    def has_advantages(self) -> bool:
        """Whether the visual advantages of tokens were captured."""
        return self.fingerprint["capture"].get("without_image") is not None

    def advantage_codes(self, items: Items) -> NDArray[np.uint8]:
        """The codes of visual advantages at the positions of several sequences; `visual/advantages.py` reads them.

        Errors: `CacheError` if the cache has none, or a sequence no record.
        """
        found = [np.zeros(0, np.uint8)]
        for columns, start, stop in self._columns(items):
            if columns.advantages is None:
                raise CacheError(f"cache '{self.path}': has no visual advantages: {_CAPTURE_ADVANTAGES}")
            found.append(columns.advantages.read(start, stop))
        return np.concatenate(found)

    @functools.cached_property
    def advantage_counts(self) -> NDArray[np.int64]:
        """How often each code occurs in the whole cache, [256], from the shards' manifests."""
        counts_C: NDArray[np.int64] = np.sum([m[VISUAL_COUNTS] for m in self.manifests()], axis=0, dtype=np.int64)
        return counts_C

    def visual_weights(self, items: Items, strength: float) -> Tensor:
        """The weights of the positions of several sequences, [N] float32; see `position_weights`."""
        codes_N = self.advantage_codes(items)
        return torch.from_numpy(position_weights(codes_N, self.advantage_counts, strength))

    def targets(self, items: Items) -> SparseTargets:
        """Decode and concatenate the positions of several sequences, as CPU tensors.

        Errors: `CacheError` if a sequence has no record or a chunk is damaged.
        """
        return sparse_targets(self.records(items), self.temperatures, self.vocab_size, self.sampled_at)

    def _columns(self, items: Items) -> Iterator[tuple[ColumnFile, int, int]]:
        """Yield the columns of each sequence's shard, and the start and stop of its positions there.

        The columns stay on this machine until the next are requested.
        """
        shards_B, spans_B2 = self._index.spans(self._find(items))
        for shard, (start, stop) in zip(shards_B.tolist(), spans_B2, strict=True):
            with self._files.hold(shard):
                yield self._blocks.file(shard), start, stop

    def _find(self, items: Items) -> NDArray[np.int64]:
        if isinstance(items, np.ndarray):
            return items
        rows_B = self._index.find(items)
        if len(rows_B) and rows_B.min() < 0:
            raise self._unknown(*items[int(rows_B.argmin())])
        return rows_B

    def _find_one(self, key: str, role: str) -> int:
        row = self._index.find_one(key, role)
        if row < 0:
            raise self._unknown(key, role)
        return row

    def _unknown(self, key: str, role: str) -> CacheError:
        return CacheError(
            f"cache '{self.path}': no record of sample '{key}' ({role}): look for it in rejected.jsonl, "
            "or capture the set that contains it"
        )


def _reopen(where: str, memory_bytes: int, staging: DiskCache | None, temperature: float | None) -> TeacherCache:
    return TeacherCache(where, memory_bytes, staging=staging, temperature=temperature)
