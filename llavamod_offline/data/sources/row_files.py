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
from llavamod_offline.data.sources.system_files import is_system_name
from llavamod_offline.errors import DataError
from llavamod_offline.storage.walk import walk_files

if TYPE_CHECKING:
    import pyarrow as pa
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
        columns = _known_columns(file, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
            yield from enumerate(batch.to_pylist(), rows)
            rows += len(batch)
            reached = size * rows // table.metadata.num_rows
            advance(reached - told)
            told = reached
    advance(size - told)


def _known_columns(file: Path, names: list[str]) -> list[str]:
    columns = [name for name in names if name in (*FIELDS, *MEDIA_FIELDS, *_IDS, *_SOURCES)]
    if not set(TEXT_FIELDS) & set(columns):
        raise DataError(f"{file}: its columns are {', '.join(names[:12])}: expected {KNOWN}")
    return columns


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


def _arrow_rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    rows = 0
    for batch in _arrow_batches(file):
        columns = _known_columns(file, batch.schema.names)
        for start in range(0, len(batch), _PARQUET_BATCH):
            yield from enumerate(batch.select(columns).slice(start, _PARQUET_BATCH).to_pylist(), rows + start)
        rows += len(batch)
    advance(file.stat().st_size)


def _arrow_outline(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    yield from ((row, {}) for row in range(sum(len(batch) for batch in _arrow_batches(file))))
    advance(file.stat().st_size)


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file or stream, mapped into memory."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as mapped:
            try:
                reader = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:  # as `datasets` writes them
                mapped.seek(0)
                yield from pa.ipc.open_stream(mapped)
            else:
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Arrow: {str(error).splitlines()[0]}") from error


def tables_below(folder: Path) -> list[str]:
    """The parquet and Arrow files below a folder, by relative name, as data sets of the Hugging Face hub have them."""
    return [name for name in walk_files(folder, is_system_name) if name.endswith((".parquet", ".arrow"))]


ROW_FILES = {
    ".json": RowFile(_array_rows, _array_rows),
    ".jsonl": RowFile(stream_lines, stream_lines),
    ".parquet": RowFile(_parquet_rows, _parquet_outline, _IDS, _SOURCES, holds_images=True),
    ".arrow": RowFile(_arrow_rows, _arrow_outline, _IDS, _SOURCES, holds_images=True),
}
