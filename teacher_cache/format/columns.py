"""A shard's columns on disk: one Zarr v3 group, each array in one shard file with a chunk per block (zstd, CRC-32C).

Shape suffixes: V ids, F frequent ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from llavamod_offline.errors import CacheError, first_line
from llavamod_offline.storage.zarr_rows import RowArray
from teacher_cache.format.decode import decode_block
from teacher_cache.format.encode import check_range, encode_block
from teacher_cache.format.hidden_states import HiddenFile, HiddenStates, write_hidden
from teacher_cache.format.id_codes import frequent_ids, ids_by_rank, ranks_by_id
from teacher_cache.format.record import Records
from teacher_cache.format.schema import Block, Codec
from teacher_cache.format.tail_profile import mean_tail, spread
from teacher_cache.visual.advantages import AdvantageFile, write_advantages

BLOCK_POSITIONS = 32768
_SHARD_ARRAYS = {"frequent_ids": "<u4", "tail_profile": "<f4"}  # one row each
_METADATA = "zarr.json"
_POSITIONS_PER_FREQUENT_ID = 16
_ZSTD_LEVEL = 6


def write_columns(
    folder: Path,
    records: Records,
    codec: Codec,
    hidden: Sequence[HiddenStates] = (),
    sequences: Sequence[int] = (),
    advantages_N: NDArray[np.uint8] | None = None,
) -> None:
    """Write all records as the Zarr group `folder`. Equal records give equal bytes.

    `hidden`: the states of each sequence, if the codec has any; `sequences`: the number of positions of each;
    `advantages_N`: the codes of visual advantages, likewise.

    Errors: `CacheError` if an id or a count is out of range, or a forced id is missing.
    """
    check_range(codec, records)
    ids = np.concatenate([records.topk_ids_H, records.tail_ids_D])
    frequent_F = frequent_ids(ids, codec.vocab_size, -(-len(records) // _POSITIONS_PER_FREQUENT_ID))
    ranks_V = ranks_by_id(ids_by_rank(frequent_F, codec.vocab_size))
    lengths = [min(BLOCK_POSITIONS, len(records) - start) for start in range(0, len(records), BLOCK_POSITIONS)]
    blocks = [encode_block(codec, piece, ranks_V) for piece in records.split(lengths)]
    profile = mean_tail(records, frequent_F, codec.vocab_size)
    group = write_blocks(folder, blocks, codec, positions=len(records), frequent_F=frequent_F, profile=profile)
    if codec.hidden and hidden:
        write_hidden(group, hidden, sequences, codec.hidden)
    if codec.visual:
        write_advantages(group, np.zeros(len(records), np.uint8) if advantages_N is None else advantages_N)


def write_blocks(
    folder: Path,
    blocks: Sequence[Block],
    codec: Codec,
    *,
    positions: int,
    frequent_F: NDArray[np.int32],
    profile: NDArray[np.float32],
) -> zarr.Group:
    """Write encoded blocks as the Zarr group `folder`."""
    attributes = codec.attributes() | {"positions": positions, "block_positions": BLOCK_POSITIONS}
    group = zarr.create_group(folder, zarr_format=3, attributes=attributes)
    _write(group, "frequent_ids", frequent_F.astype("<u4")[None])
    _write(group, "tail_profile", profile.astype("<f4")[None])
    for name, column in codec.columns.items():
        rows = [block[name] for block in blocks]
        table = np.zeros((len(rows), *column.middle, max((row.shape[-1] for row in rows), default=0)), column.dtype)
        for place, row in enumerate(rows):
            table[place, ..., : row.shape[-1]] = row
        array = _write(group, name, table)
        if column.rows is None:
            array.attrs["lengths"] = [row.shape[-1] for row in rows]
    return group


def _write(group: zarr.Group, name: str, table: NDArray[Any]) -> zarr.Array[Any]:
    """Write one array, one chunk per block and row."""
    length = max(1, table.shape[-1])
    array = group.create_array(
        name,
        shape=table.shape,
        dtype=table.dtype,
        chunks=(*(1 for _ in table.shape[:-1]), length),
        shards=(*(max(1, size) for size in table.shape[:-1]), length),
        filters=None,
        compressors=[
            BloscCodec(cname="zstd", clevel=_ZSTD_LEVEL, shuffle="shuffle", typesize=table.dtype.itemsize),
            Crc32cCodec(),
        ],
        fill_value=0,
    )
    if table.size:
        array[...] = table
    return array


class ColumnFile:
    """The columns of one shard, opened for decoding blocks. Errors of every method: `CacheError` naming the array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            attributes: dict[str, Any] = json.loads((folder / _METADATA).read_bytes())["attributes"]
            self.codec = Codec.from_attributes(attributes, where=str(folder))
            self.positions = int(attributes["positions"])
            self.block_positions = int(attributes["block_positions"])
            self._arrays: dict[str, RowArray] = {}
            for name, column in self.codec.columns.items():
                self._arrays[name] = self._open(name, column.dtype, (self.blocks, *column.middle))
            self._lengths: dict[str, list[int]] = {
                name: [int(value) for value in self._arrays[name].attributes["lengths"]]
                for name, column in self.codec.columns.items()
                if column.rows is None
            }
            self._arrays |= {name: self._open(name, np.dtype(kind), (1,)) for name, kind in _SHARD_ARRAYS.items()}
            self.frequent_ids_F = self._read("frequent_ids", 0, 1)[0].astype(np.int32)
            self._ids_V = ids_by_rank(self.frequent_ids_F, self.codec.vocab_size)
        except CacheError:
            raise
        except Exception as error:  # damaged metadata may raise anything
            raise CacheError(_damaged(folder, error)) from error

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.positions // self.block_positions)

    def tail_profile(self) -> NDArray[np.float64]:
        """The shard's mean tail: mass of every id [V], summing to the mean tail mass. Errors: `CacheError`."""
        return spread(self._read("tail_profile", 0, 1)[0], self.frequent_ids_F, self.codec.vocab_size)

    @cached_property
    def hidden(self) -> HiddenFile | None:
        """The hidden states of the shard, None if its cache has none. Errors: `CacheError`."""
        if self.codec.hidden is None or not self.positions:
            return None
        return HiddenFile(self._group(), self.codec.hidden, self.positions, str(self.folder))

    @cached_property
    def advantages(self) -> AdvantageFile | None:
        """The visual advantages of the shard, None if its cache has none. Errors: `CacheError`."""
        return AdvantageFile(self._group(), self.positions, str(self.folder)) if self.codec.visual else None

    def _group(self) -> zarr.Group:
        try:
            return zarr.open_group(self.folder, mode="r", zarr_format=3)
        except Exception as error:  # damaged metadata may raise anything in zarr
            raise CacheError(_damaged(self.folder, error)) from error

    def columns(self, first: int, last: int) -> list[Block]:
        """Read the stored columns of the blocks `first` … `last` − 1."""
        blocks: list[Block] = [{} for _ in range(first, last)]
        for name, column in self.codec.columns.items():
            rows = self._read(name, first, last)
            for place, block in enumerate(blocks):
                number = first + place
                positions = min(self.block_positions, self.positions - number * self.block_positions)
                length = self._lengths[name][number] if column.rows is None else positions
                block[name] = rows[place, ..., :length]
        return blocks

    def records(self, first: int, last: int, temperatures: tuple[float, ...] | None = None) -> list[Records]:
        """Decode the blocks `first` … `last` − 1, with the normalisers of some temperatures (None: all)."""
        wanted = self.codec.temperatures if temperatures is None else temperatures
        try:
            return [decode_block(self.codec, block, self._ids_V, wanted) for block in self.columns(first, last)]
        except CacheError as error:
            raise CacheError(f"{self.folder}: {error}: run `cache-teacher verify`") from error

    def _open(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> RowArray:
        """Open an array of `shape`, which omits the row length."""
        try:
            array = RowArray.parse((self.folder / name / _METADATA).read_bytes())
        except FileNotFoundError as error:
            raise CacheError(f"{self.folder / name}: missing, expected {dtype}: run `cache-teacher verify`") from error
        except Exception as error:
            raise CacheError(_damaged(self.folder / name, error)) from error
        if array.dtype != dtype or array.shape[:-1] != shape:
            found = f"{array.dtype} {array.shape}"
            raise CacheError(f"{self.folder / name}: {found}, expected {dtype}: run `cache-teacher verify`")
        return array

    def _read(self, name: str, first: int, last: int) -> NDArray[Any]:
        array = self._arrays[name]
        try:
            with open(f"{self.folder}/{name}/{array.file}", "rb") as file:
                return array.read(file, first, last)
        except FileNotFoundError:  # all zeros: files that the manifest lists are known to exist
            return array.read(None, first, last)
        except Exception as error:  # a damaged chunk may raise anything in a codec
            raise CacheError(_damaged(self.folder / name, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read: {first_line(error)}: run `cache-teacher verify`"
