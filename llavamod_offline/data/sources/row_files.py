"""Files of rows, by suffix: how rows are streamed and counted; `row_formats.py` makes samples of them.

To add a kind of file, write its functions and enter them in `ROW_FILES`, which packing, catalogues and the doctor read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.parse.row_formats import FIELDS, KNOWN, MEDIA_FIELDS, TEXT_FIELDS
from llavamod_offline.data.sources.json_stream import Advance, stream_array, stream_lines
from llavamod_offline.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

Rows = Callable[[Path, Advance], Iterator[tuple[int, Any]]]  # row numbers and contents; a bad row is a `RowError`

_IDS = ("id", "idx")
_SOURCES = ("ds_name", "data_source")
_PARQUET_BUFFER = 2**20
_PARQUET_BATCH = 32  # rows, each with its image


@dataclass(frozen=True)
class RowFile:
    """How files of one suffix are read; every valid row is a mapping of fields.

    `rows`: all of a file's rows; `outline`: as much of them as counting needs, without images stored in the file.
    `id_fields`: where a row's id may be, `source_fields`: where its source may be. `holds_images`: whether rows usually
    hold their images, so that there need not be folders of them.
    """

    rows: Rows
    outline: Rows
    id_fields: tuple[str, ...] = ("id",)
    source_fields: tuple[str, ...] = ()
    holds_images: bool = False


def _array_rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    return enumerate(stream_array(file, advance))


def _parquet_rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    size, told, rows = file.stat().st_size, 0, 0
    with _parquet(file) as table:
        columns = [name for name in table.schema_arrow.names if name in (*FIELDS, *MEDIA_FIELDS, *_IDS, *_SOURCES)]
        if not set(TEXT_FIELDS) & set(columns):
            found = ", ".join(table.schema_arrow.names[:12])
            raise DataError(f"{file}: its columns are {found}: expected {KNOWN}")
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
            yield from enumerate(batch.to_pylist(), rows)
            rows += len(batch)
            reached = size * rows // table.metadata.num_rows
            advance(reached - told)
            told = reached
    advance(size - told)


def _parquet_outline(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    with _parquet(file) as table:
        count = table.metadata.num_rows
    yield from ((row, {}) for row in range(count))
    advance(file.stat().st_size)


@contextmanager
def _parquet(file: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table:  # else whole row groups
            yield table
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


ROW_FILES = {
    ".json": RowFile(_array_rows, _array_rows),
    ".jsonl": RowFile(stream_lines, stream_lines),
    ".parquet": RowFile(_parquet_rows, _parquet_outline, _IDS, _SOURCES, holds_images=True),
}
