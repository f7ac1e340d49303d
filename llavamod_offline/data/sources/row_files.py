"""Files of rows, by suffix: how rows are streamed, become samples, and are counted.

To add a format, write its functions and enter them in `ROW_FILES`; packing, catalogues and the doctor read that table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.parse.row_formats import ReadImage, json_row_to_sample, parquet_row_to_sample
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sources.json_stream import Advance, stream_array, stream_lines
from llavamod_offline.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

Rows = Callable[[Path, Advance], Iterator[tuple[int, Any]]]  # row numbers and contents; a bad row is a `RowError`

_PARQUET_COLUMNS = ("image", "question", "chosen", "rejected")
_PARQUET_OPTIONAL = ("idx", "ds_name")
_PARQUET_BATCH = 32  # rows, each with its image


@dataclass(frozen=True)
class RowFile:
    """How files of one suffix are read; every valid row is a mapping of fields.

    `rows`: all of a file's rows; `outline`: as much of them as counting needs, without images stored in the file.
    `to_sample` takes a row, its key, its source, and a function that reads an image by name. `id_field`: the field with
    a row's id; `source_field`: the field with its source.
    """

    rows: Rows
    outline: Rows
    to_sample: Callable[[Any, str, str, ReadImage], Sample]
    id_field: str = "id"
    source_field: str = ""


def _array_rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    return enumerate(stream_array(file, advance))


def _json_sample(row: Any, key: str, source: str, read_image: ReadImage) -> Sample:
    return json_row_to_sample(row, key=key, source=source, read_image=read_image)


def _parquet_sample(row: Mapping[str, Any], key: str, source: str, _: ReadImage) -> Sample:
    return parquet_row_to_sample(row, key=key, source=source)


def _parquet_rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    size, told, rows = file.stat().st_size, 0, 0
    with _parquet(file) as table:
        names = table.schema_arrow.names
        missing = [name for name in _PARQUET_COLUMNS if name not in names]
        if missing:
            raise DataError(f"{file}: no column '{missing[0]}': it has {', '.join(names)}")
        columns = [name for name in (*_PARQUET_COLUMNS, *_PARQUET_OPTIONAL) if name in names]
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
        with pq.ParquetFile(file) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


ROW_FILES = {
    ".json": RowFile(_array_rows, _array_rows, _json_sample),
    ".jsonl": RowFile(stream_lines, stream_lines, _json_sample),
    ".parquet": RowFile(_parquet_rows, _parquet_outline, _parquet_sample, id_field="idx", source_field="ds_name"),
}
