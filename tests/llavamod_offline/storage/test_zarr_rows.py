"""Rows of Zarr arrays: equal to what Zarr's own reader gives, and no damaged byte goes unnoticed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec

from llavamod_offline.storage.zarr_rows import RowArray


def write(folder: Path, table: NDArray[Any], **options: Any) -> RowArray:
    """Write a table as caches do, except for `options`, and open it."""
    length = max(1, table.shape[-1])
    given: dict[str, Any] = {
        "chunks": (*(1 for _ in table.shape[:-1]), length),
        "shards": (*(max(1, size) for size in table.shape[:-1]), length),
        "compressors": [BloscCodec(cname="zstd", clevel=6, shuffle="shuffle"), Crc32cCodec()],
        "fill_value": 0,
    }
    array = zarr.create_array(store=str(folder), shape=table.shape, dtype=table.dtype, **given | options)
    if table.size:
        array[...] = table
    return RowArray.parse((folder / "zarr.json").read_bytes())


def table_of(shape: tuple[int, ...], kind: str) -> NDArray[Any]:
    """Random numbers, with some rows all zero."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 255, shape).astype(kind)
    table[rng.random(shape[:-1]) < 0.3] = 0
    table[-1] = 3
    return table


@pytest.mark.parametrize("kind", ["|u1", "<u2", "<u4", "<f4"])
@pytest.mark.parametrize("shape", [(6, 500), (5, 3, 70), (1, 1), (7, 40_000)])
def test_any_range_is_as_zarr_reads_it(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    array = write(tmp_path / "a", table_of(shape, kind))
    own = zarr.open_array(tmp_path / "a", mode="r")
    with (tmp_path / "a" / array.file).open("rb") as file:
        for first in range(shape[0]):
            for last in range(first, shape[0] + 1):
                found = array.read(file, first, last)
                assert np.array_equal(found, np.asarray(own[first:last]))
                assert found.dtype == own.dtype


@pytest.mark.parametrize("shape", [(4, 9), (0, 9), (4, 0), (2, 3, 0)])
def test_what_zarr_does_not_store_is_zeros(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = write(tmp_path / "a", np.zeros(shape, np.uint16))
    assert not (tmp_path / "a" / array.file).exists()
    assert np.array_equal(array.read(None, 0, shape[0]), np.zeros(shape, np.uint16))


def test_every_damaged_byte_and_every_missing_one_is_found(tmp_path: Path) -> None:
    array = write(tmp_path / "a", table_of((3, 40), "<u2"))
    content = (tmp_path / "a" / array.file).read_bytes()
    for place in range(len(content)):
        for damaged in (content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :], content[:place]):
            with pytest.raises((ValueError, OSError)):
                array.read(BytesIO(damaged), 0, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compressors": [GzipCodec(), Crc32cCodec()]}, "gzip"),
        ({"compressors": [BloscCodec()]}, "expected .*crc32c"),
        ({"chunks": (1, 5)}, r"chunk \[1, 5\], expected \[1, 10\]"),
        ({"shards": None, "compressors": [BloscCodec(), Crc32cCodec()]}, "codecs"),
        ({"shards": (1, 10)}, r"file \[1, 10\], expected \[3, 10\]"),
        ({"fill_value": 7}, "fill_value 7"),
        ({"serializer": BytesCodec(endian="big")}, "big-endian"),
    ],
)
def test_an_array_that_is_stored_in_another_way_is_refused(options: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "a", table_of((3, 10), "<u2"), **options)


def test_a_chunk_of_another_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", table_of((3, 10), "<u2"))
    longer = write(tmp_path / "b", table_of((3, 12), "<u2"))
    with (tmp_path / "a" / longer.file).open("rb") as file, pytest.raises(ValueError, match="24 bytes"):
        longer.read(file, 0, 3)
