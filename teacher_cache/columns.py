"""A shard's columns on disk: one Zarr v3 group, each array in one shard file of small chunks (zstd, CRC-32C)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from llavamod_offline.errors import CacheError
from teacher_cache.codec import COLUMN_AXES, Axis, Codec

# Small enough that one sequence's slice costs little, large enough that a chunk's fixed costs do too.
CHUNK_LENGTHS: dict[Axis, int] = {"position": 8192, "head": 131072, "draw": 32768}
_ZSTD_LEVEL = 5


def write_columns(folder: Path, columns: Mapping[str, NDArray[Any]], codec: Codec) -> None:
    """Write all columns as the Zarr group `folder`. Equal columns give equal bytes."""
    group = zarr.create_group(folder, zarr_format=3, attributes=codec.attributes())
    for name, values in columns.items():
        axis = COLUMN_AXES[name]
        length = min(CHUNK_LENGTHS[axis], max(1, len(values)))
        others = values.shape[1:]
        if 0 in others:
            continue  # no temperatures: there is nothing to hold
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(length, *others),
            shards=(length * max(1, -(-len(values) // length)), *others),
            filters=None,
            compressors=[
                BloscCodec(cname="zstd", clevel=_ZSTD_LEVEL, shuffle="shuffle", typesize=values.dtype.itemsize),
                Crc32cCodec(),
            ],
            fill_value=0,
            dimension_names=(axis, "temperature")[: values.ndim],
        )
        if len(values):
            array[...] = values


class ColumnFile:
    """The columns of one shard, opened for reading slices. Errors of every method: `CacheError` naming the array."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            group = zarr.open_group(folder, mode="r", zarr_format=3)
            self.codec = Codec.from_attributes(group.attrs.asdict(), where=str(folder))
            self._arrays = dict(group.arrays())
        except CacheError:
            raise
        except Exception as error:  # a damaged zarr.json may make zarr stumble in any way
            raise CacheError(_damaged(folder, error)) from error
        self._check()

    def length(self, axis: Axis) -> int:
        """The number of positions, head entries or draws."""
        name = {"position": "target_ids", "head": "head_ids", "draw": "draw_ids"}[axis]
        return int(self._arrays[name].shape[0])

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read one slice of one column."""
        if name not in self._arrays:
            return np.zeros((stop - start, 0), np.float32)
        try:
            return np.asarray(self._arrays[name][start:stop])
        except Exception as error:  # a damaged chunk may make a codec stumble in any way
            raise CacheError(_damaged(self.folder / name, error)) from error

    def _check(self) -> None:
        for name, dtype in self.codec.dtypes().items():
            columns = len(self.codec.temperatures) if name == "log_normalisers" else 1
            if not columns:
                continue
            array = self._arrays.get(name)
            width = (columns,) if name == "log_normalisers" else ()
            if array is None or array.dtype != dtype or array.shape[1:] != width:
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise CacheError(f"{self.folder / name}: {found}, expected {dtype}: run `cache-teacher verify`")
        for name in COLUMN_AXES:
            if name in self._arrays and self._arrays[name].shape[0] != self.length(COLUMN_AXES[name]):
                raise CacheError(f"{self.folder / name}: its length does not fit: run `cache-teacher verify`")


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{path}: cannot be read: {reason}: run `cache-teacher verify`"
