"""Read Zarr v3 arrays that are one shard file each, one chunk per row, as `teacher_cache/FORMAT.md` specifies them.

Any Zarr library reads them too. Zarr's own runs several coroutines and a thread for every chunk, however small: for a
cache's columns this takes four times as long as decompressing and checking them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

_TYPES = {"uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "float32": "<f4"}
_CRC_BYTES = 4
_PLACE_BYTES = 16  # offset and length of a chunk
_NOT_STORED = 2**64 - 1  # both, for a chunk of zeros


@dataclass(frozen=True)
class RowArray:
    """An array's shape, little-endian type and attributes, and the name of its shard file within its folder.

    Rows run along the last axis, and the file holds one chunk for each.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: dict[str, Any]
    file: str

    @classmethod
    def parse(cls, metadata: bytes) -> RowArray:
        """Read an array's `zarr.json`. Errors: `ValueError` if its rows are stored in another way."""
        content = json.loads(metadata)
        shape = tuple(int(size) for size in content["shape"])
        one = [max(1, size) for size in shape]
        said: dict[str, Any] = content["codecs"][0].get("configuration", {})
        found = {
            "zarr_format": content["zarr_format"],
            "fill_value": content["fill_value"],
            "codecs": [codec["name"] for codec in content["codecs"]],
            "inner codecs": [_named(codec) for codec in said.get("codecs", ())],
            "index codecs": [_named(codec) for codec in said.get("index_codecs", ())],
            "index": said.get("index_location"),
            "file": content["chunk_grid"]["configuration"]["chunk_shape"],
            "chunk": said.get("chunk_shape"),
        }
        expected = {
            "zarr_format": 3,
            "fill_value": 0,
            "codecs": ["sharding_indexed"],
            "inner codecs": ["bytes", "blosc", "crc32c"],
            "index codecs": ["bytes", "crc32c"],
            "index": "end",
            "file": one,
            "chunk": [*(1 for _ in one[:-1]), one[-1]],
        }
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(f"{name} {found[name]}, expected {value}")
        dtype = np.dtype(_TYPES[content["data_type"]])
        return cls(shape, dtype, content.get("attributes", {}), "/".join(["c", *("0" for _ in shape)]))

    def read(self, file: BinaryIO | None, first: int, last: int) -> NDArray[Any]:
        """Read `first` … `last` − 1 of the first axis; zeros if there is no file, since Zarr writes none for all zeros.

        Errors: `ValueError` if a checksum or a size is wrong.
        """
        table = np.zeros((last - first, *self.shape[1:]), self.dtype)
        if file is None or not table.size:
            return table
        rows = table.reshape(-1, self.shape[-1])
        each = len(rows) // len(table)
        size = _PLACE_BYTES * each * self.shape[0]
        file.seek(-size - _CRC_BYTES, 2)
        index = _checked(file.read(size + _CRC_BYTES), "the index of its chunks")
        places = index.view("<u8").reshape(-1, 2)[first * each : last * each]
        for number, (row, (offset, length)) in enumerate(zip(rows, places.tolist(), strict=True), first * each):
            if offset == length == _NOT_STORED:
                continue
            file.seek(offset)
            chunk = _checked(file.read(length), f"chunk {number}")
            uncompressed = int.from_bytes(chunk[4:8].tobytes(), "little")  # in Blosc's header
            if uncompressed != row.nbytes:
                raise ValueError(f"chunk {number} is not a row of {row.nbytes} bytes")
            blosc.decompress(chunk, row)
        return table


def _named(codec: dict[str, Any]) -> str:
    """A codec's name; for `bytes`, also the byte order if it is not the usual one."""
    endian = codec.get("configuration", {}).get("endian", "little")
    return str(codec["name"]) if endian == "little" else f"{codec['name']} ({endian}-endian)"


def _checked(content: bytes, what: str) -> NDArray[np.uint8]:
    """The content without the CRC-32C at its end, which is checked."""
    inner = np.frombuffer(content, np.uint8)[:-_CRC_BYTES]
    if google_crc32c.value(inner) != int.from_bytes(content[-_CRC_BYTES:], "little"):
        raise ValueError(f"{what} has a wrong checksum")
    return inner
