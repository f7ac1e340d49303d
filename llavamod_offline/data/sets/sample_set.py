"""A packed set: a folder of WebDataset tars with an index, for fast opening and random access.

    {name}-000000.tar …   samples, see `sample.py`; members are read by position, tars are never scanned. Sets made by
                          `llavamod-offline index` have none: they read other tars in place
    index.arrow           Arrow IPC file, one row per sample, in the order of the tars; memory-mapped
    set.json              format, name, counts, digest, weights of sources, and each shard's samples, size, SHA-256
                          and, if it is elsewhere, path (relative to this folder, or absolute); written last.
                          If known: `licences` of sources; `max_side`, to which images were shrunk; `generated`:
                          which teacher wrote the answers, how, and from which set
    rejected.jsonl        the source rows that are not in the set: key, kind, reason, file, row

Columns of the index: `key`; `shard` (ordinal in set.json's list); `content_hash`; `kind` (`conversation`, `preference`,
or `desirable` or `undesirable` for an unpaired answer); `n_turns` and `n_images` (of the sample, answers of a
preference not counted); `source`; `text_length` (characters of all texts); `parser` (the format of its text, see
`members.py`); `n_shrunk` (images that packing shrank); `file` and `row`: where the sample comes from, an ordinal in
set.json's `files` and a row or member from 0 (absent in sets of earlier versions); `members`: for each file of the
sample its `name` (what follows the key and a dot), and the `offset` and `size` of its bytes in the tar, the text first,
then the images in order.
"""

from __future__ import annotations

import json
import posixpath
from bisect import bisect_right
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llavamod_offline.data.keys import stored_key
from llavamod_offline.data.parse.members import responses_from_text, sample_from_members
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.mismatched import MismatchRing
from llavamod_offline.data.sets.tar_files import Shard, TarFiles
from llavamod_offline.errors import DataError
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.folders import LocalFolder, is_url, open_folder
from llavamod_offline.storage.remote import RemoteFolder, Wanted
from llavamod_offline.storage.walk import no_folder

SET_FORMAT = 2
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
        pa.field("parser", pa.string(), nullable=False),
        pa.field("n_shrunk", pa.int32(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field(
            "members",
            pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])),
            nullable=False,
        ),
    ]
)


_NO_IMAGE = b"\xff\xd8\xff"  # the signature of a JPEG
_EARLIER_SCHEMA = pa.schema([field for field in INDEX_SCHEMA if field.name not in ("file", "row")])
_READ_COLUMNS = ("key", "parser", "source", "content_hash", "members")


class SampleSet:
    """The samples of a packed set, numbered in set order.

    Reads are positional and share no state, so threads, forked and spawned workers may use a set.
    Errors of every method: `DataError` naming the set, the shard and the key.
    """

    def __init__(
        self,
        path: Path | str,
        manifest: dict[str, Any],
        shards: tuple[Shard, ...],
        index: pa.Table,
        staging: DiskCache | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.shards = shards
        self.index = index
        self._ends = list(accumulate(shard.samples for shard in shards))
        self._staging = staging
        self.tars = TarFiles(_places(path, shards), shards, str(path), staging)
        self._ring: MismatchRing | None = None

    @classmethod
    def open(cls, where: Path | str, *, staging: DiskCache | None = None) -> SampleSet:
        """Open a set by path or URL; reads its manifest and index, but no tar.

        `staging`: the cache for copies of remote files (default: see `storage/disk_cache.py`).
        Errors: `DataError` if it is not a set, of another format, empty, or its index does not match its manifest;
        `StorageError` if a bucket cannot be read.
        """
        folder = open_folder(where)
        path = folder.path if isinstance(folder, LocalFolder) else folder.where
        manifest, shards = _read_manifest(folder)
        if isinstance(folder, RemoteFolder):
            index = _staged_index(folder, manifest, staging or DiskCache())
        else:
            index = _read_index(folder.path, str(path))
        if sum(shard.samples for shard in shards) != len(index):
            raise DataError(f"set '{path}': {INDEX_NAME} does not match {MANIFEST_NAME}: pack the set again")
        if not len(index):
            raise DataError(f"set '{path}': holds no samples: see {REJECTED_NAME} in it for the reasons")
        return cls(path, manifest, shards, index, staging)

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.path, self.mismatched, self._staging))

    @property
    def mismatched(self) -> bool:
        """Whether preference samples have a mismatched response, as their third role."""
        return self._ring is not None

    @property
    def has_preferences(self) -> bool:
        """Whether any sample is a preference, paired or not."""
        return any(self.manifest.get(name) for name in ("preferences", "unpaired"))

    def with_mismatched(self) -> SampleSet:
        """The same set, whose preference samples also have the response of another one (see `mismatched.py`).

        Errors: `DataError` if it holds fewer than two preference samples; while reading, naming the sample, if no other
        sample has a different response.
        """
        paired = SampleSet(self.path, self.manifest, self.shards, self.index, self._staging)
        paired._ring = MismatchRing.of(self.index, where=f"set '{self.path}'")
        return paired

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over every key and content hash in order: equal sets have equal digests."""
        return str(self.manifest["digest"])

    @cached_property
    def keys(self) -> list[str]:
        """The keys in set order."""
        return [str(key) for key in self.index.column("key").to_pylist()]

    @property
    def is_remote(self) -> bool:
        """Whether any tar is behind a URL."""
        return any(self.tars.is_remote(ordinal) for ordinal in range(len(self.shards)))

    @property
    def shard_names(self) -> list[str]:
        """The names of the tars, without `.tar`, in set order."""
        return [shard.name for shard in self.shards]

    def rows_of(self, shard_name: str) -> range:
        """The rows in a shard."""
        rows = self.shard_rows.get(shard_name)
        if rows is None:
            raise DataError(f"set '{self.path}': has no shard '{shard_name}'")
        return rows

    @cached_property
    def shard_rows(self) -> dict[str, range]:
        """The rows in each shard, by its name."""
        starts = [0, *self._ends]
        return {
            shard.name: range(start, end) for shard, start, end in zip(self.shards, starts, self._ends, strict=False)
        }

    def shard_numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ordinals of the rows' shards."""
        return np.searchsorted(np.array(self._ends, np.int64), rows, side="right")

    def key_of(self, row: int) -> str:
        """The key of a row."""
        return str(self.index.column("key")[row])

    def row_of(self, key: str) -> int:
        """The row of a key, given as it is stored or as the data set's id."""
        row = self._rows_by_key.get(stored_key(key, self._rows_by_key.__contains__))
        if row is None:
            raise DataError(f"set '{self.path}': has no sample '{key}'")
        return row

    def origin(self, key: str) -> tuple[str, int] | None:
        """The file that a sample was packed from, and its row there from 0; None in sets of earlier versions."""
        return self.origin_of(self.row_of(key))

    def origin_of(self, row: int) -> tuple[str, int] | None:
        """The same for a row of the set, without a table of all keys."""
        if "file" not in self.index.column_names:
            return None
        file, place = (self.index.column(name)[row].as_py() for name in ("file", "row"))
        return str(self.manifest["files"][file]), int(place)

    def read(self, row: int, *, verify: bool = False, scattered: bool = False) -> Sample:
        """Read one sample; `verify` also recomputes its content hash.

        `scattered`: only a few samples of its shard are needed, so a remote shard is not copied for them.
        """
        if not 0 <= row < len(self):
            raise DataError(f"set '{self.path}': has no row {row}: it holds {len(self)} samples")
        entry, ordinal, where = self._entry(row)
        images = [self._read_bytes(ordinal, member, where, scattered) for member in entry["members"][1:]]
        sample = self._parsed(row, entry, ordinal, where, images, scattered)
        if verify and sample.content_hash != entry["content_hash"]:
            raise DataError(f"{where}: its content differs from what was packed: {self.shards[ordinal].again}")
        return sample

    def read_text(self, row: int) -> Sample:
        """Read one sample with placeholders instead of its images: its text, and how many images it has."""
        entry, ordinal, where = self._entry(row)
        return self._parsed(row, entry, ordinal, where, [_NO_IMAGE] * (len(entry["members"]) - 1), scattered=True)

    def with_response(self, row: int, sample: Sample) -> Sample:
        """The sample of a row with its mismatched response, if the set has those."""
        if self._ring is None or not sample.is_preference:
            return sample
        return replace(sample, mismatched=self._ring.response(row, sample, self._read_responses))

    def _parsed(
        self, row: int, entry: dict[str, Any], ordinal: int, where: str, images: list[bytes], scattered: bool
    ) -> Sample:
        """Read the text of a row and make its sample, with its mismatched response if the set has those."""
        content = self._read_bytes(ordinal, entry["members"][0], where, scattered)
        try:
            sample = sample_from_members(
                entry["parser"],
                str(entry["key"]),
                content,
                tuple(images),
                entry["source"],
                self.manifest.get("caption_prompt"),
            )
        except DataError as error:
            raise DataError(f"{where}: {error}: {self.shards[ordinal].again}") from error
        return self.with_response(row, sample)

    def _read_responses(self, row: int) -> tuple[str, ...]:
        """The chosen and the rejected response of a row, or the one that it has, without its images."""
        entry, ordinal, where = self._entry(row)
        member = entry["members"][0]
        try:
            return responses_from_text(entry["parser"], self._read_bytes(ordinal, member, where, scattered=True))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{where}: its JSON cannot be read: {error!r}: pack the set again") from error

    def _entry(self, row: int) -> tuple[dict[str, Any], int, str]:
        """A row of the index, its shard's ordinal, and its name in errors."""
        entry = {name: column[row].as_py() for name, column in self._read_columns.items()}
        ordinal = bisect_right(self._ends, row)
        return entry, ordinal, f"set '{self.path}', shard '{self.shards[ordinal].name}', sample '{entry['key']}'"

    @cached_property
    def _read_columns(self) -> dict[str, pa.ChunkedArray]:
        """The columns that reading needs, looked up once, because a table assembles each from all its batches."""
        return {name: self.index.column(name) for name in _READ_COLUMNS}

    @cached_property
    def _rows_by_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def _read_bytes(self, ordinal: int, member: dict[str, Any], where: str, scattered: bool) -> bytes:
        content = self.tars.read(ordinal, member["offset"], member["size"], scattered=scattered)
        if len(content) != member["size"]:
            there = f"the tar holds {len(content)} of its {member['size']} bytes"
            raise DataError(f"{where}, member '{member['name']}': {there}: pack the set again")
        return content


def _reopen(path: Path | str, mismatched: bool, staging: DiskCache | None) -> SampleSet:
    packed = SampleSet.open(path, staging=staging)
    return packed.with_mismatched() if mismatched else packed


def _places(path: Path | str, shards: tuple[Shard, ...]) -> list[Path | str]:
    """The location of each tar."""
    return [_place(path, shard.path or f"{shard.name}.tar") for shard in shards]


def _place(path: Path | str, file: str) -> Path | str:
    if is_url(file):
        return file
    if isinstance(path, Path) or posixpath.isabs(file):
        return path / Path(file) if isinstance(path, Path) else Path(file)
    scheme, _, rest = path.partition("://")  # in a bucket, `..` is an ordinary name
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, file))}"


def _read_manifest(folder: LocalFolder | RemoteFolder) -> tuple[dict[str, Any], tuple[Shard, ...]]:
    path = folder.where
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        raise DataError(f"set '{path}': {no_folder(folder.path)}: make a set with `llavamod-offline pack`")
    try:
        content = folder.read(MANIFEST_NAME)
    except FileNotFoundError as error:
        raise DataError(
            f"set '{path}': has no {MANIFEST_NAME}, so it is not a packed set: make one with `llavamod-offline pack`"
        ) from error
    try:
        manifest = json.loads(content)
        found = manifest["format"]
        if found != SET_FORMAT:
            raise DataError(f"set '{path}': format {found}, this version reads {SET_FORMAT}: pack the set again")
        shards = tuple(
            Shard(
                str(entry["name"]),
                int(entry["samples"]),
                int(entry["bytes"]),
                str(entry["sha256"]),
                str(entry.get("path", "")),
            )
            for entry in manifest["shards"]
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"set '{path}': {MANIFEST_NAME} cannot be read: {error!r}: pack the set again") from error
    return manifest, shards


def _staged_index(folder: RemoteFolder, manifest: dict[str, Any], staging: DiskCache) -> pa.Table:
    """Copy a remote set's index and open it; a mapped file stays readable after its removal."""
    entry = manifest.get("index")  # absent in sets of earlier versions
    size = folder.size(INDEX_NAME) if entry is None else int(entry["bytes"])

    def fill(aside: Path) -> None:
        wanted = Wanted(INDEX_NAME, aside / INDEX_NAME, size, None if entry is None else str(entry["sha256"]))
        try:
            changed = folder.fetch([wanted])
        except FileNotFoundError as error:
            raise DataError(f"set '{folder.where}': no {INDEX_NAME}: upload or pack it again") from error
        if changed:
            raise DataError(f"set '{folder.where}': {INDEX_NAME} differs from what was packed: upload or pack it again")

    with staging.hold(f"index-{manifest['digest']}-{size}", size, fill) as entry_folder:
        return _read_index(entry_folder, folder.where)


def _read_index(folder: Path, path: str) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(folder / INDEX_NAME))).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"set '{path}': {INDEX_NAME} cannot be read: {error}: pack the set again") from error
    if not any(table.schema.equals(schema) for schema in (INDEX_SCHEMA, _EARLIER_SCHEMA)):
        raise DataError(f"set '{path}': {INDEX_NAME} has other columns than this version's: pack the set again")
    return table
