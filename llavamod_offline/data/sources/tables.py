"""Tables of rows: parquet and Arrow files, read batch by batch; a batch becomes rows only where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.parse.row_formats import FIELDS, KNOWN, MEDIA_FIELDS, TEXT_FIELDS
from llavamod_offline.data.sources.json_stream import Advance
from llavamod_offline.errors import DataError, first_line
from llavamod_offline.storage.remote_file import Place, open_place, place_size

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IDS = ("id", "idx")
SOURCES = ("ds_name", "data_source")
_BUFFER = 2**20
_BATCH_BYTES = 2**22  # about the size of a batch; a single row's image may exceed it
_BATCH_ROWS = 256


@dataclass(frozen=True)
class TableRows:
    """Some rows of a table, the first of which has the number `first`."""

    first: int
    batch: pa.RecordBatch

    def listed(self) -> list[tuple[int, Any]]:
        """Their numbers and contents."""
        return list(enumerate(self.batch.to_pylist(), self.first))

    def __reduce__(self) -> tuple[Callable[[int, bytes], TableRows], tuple[int, bytes]]:
        """Pickle these rows alone: pickling a slice would include everything that it is a slice of."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batch.schema) as stream:
            stream.write_batch(self.batch)
        return _unpickled, (self.first, sink.getvalue().to_pybytes())


def _unpickled(first: int, content: bytes) -> TableRows:
    import pyarrow as pa

    with pa.ipc.open_stream(content) as stream:
        return TableRows(first, stream.read_next_batch())


def parquet_rows(file: Place, advance: Advance, start: int) -> Iterator[TableRows]:
    """The rows of a parquet file from row `start` on; earlier row groups are not read. Errors: `DataError`."""
    size, told, first = place_size(file), 0, 0
    with _parquet(file) as table:
        columns = _known_columns(file, table.schema_arrow.names)
        for group in range(table.metadata.num_row_groups):
            about = table.metadata.row_group(group)
            if first + about.num_rows > start:
                rows = _batch_rows(about.total_byte_size, about.num_rows)
                at = first
                for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
                    late = max(0, min(start - at, len(batch)))
                    if late < len(batch):
                        yield TableRows(at + late, batch.slice(late))
                    at += len(batch)
                    reached = size * at // table.metadata.num_rows
                    advance(reached - told)
                    told = reached
            first += about.num_rows
    advance(size - told)


def parquet_outline(file: Place, advance: Advance) -> Iterator[tuple[int, Any]]:
    """The numbers of a parquet file's rows."""
    with _parquet(file) as table:
        count = table.metadata.num_rows
    yield from ((row, {}) for row in range(count))
    advance(place_size(file))


def arrow_rows(file: Place, advance: Advance, start: int) -> Iterator[TableRows]:
    """The rows of an Arrow file or stream from row `start` on. Errors: `DataError`."""
    first = 0
    for batch in _arrow_batches(file):
        known = batch.select(_known_columns(file, batch.schema.names))
        rows = _batch_rows(known.nbytes, len(known))
        for at in range(max(0, start - first), len(known), rows):
            yield TableRows(first + at, known.slice(at, rows))
        first += len(known)
    advance(place_size(file))


def arrow_outline(file: Place, advance: Advance) -> Iterator[tuple[int, Any]]:
    """The numbers of an Arrow file's rows."""
    yield from ((row, {}) for row in range(sum(len(batch) for batch in _arrow_batches(file))))
    advance(place_size(file))


def _batch_rows(size: int, rows: int) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def _known_columns(file: Place, names: list[str]) -> list[str]:
    columns = [name for name in names if name in (*FIELDS, *MEDIA_FIELDS, *IDS, *SOURCES)]
    if not set(TEXT_FIELDS) & set(columns):
        raise DataError(f"{file}: its columns are {', '.join(names[:12])}: expected {KNOWN}")
    return columns


@contextmanager
def _parquet(file: Place) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with (
            open_place(file) as stream,
            pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False) as table,  # else it reads whole row groups
        ):
            yield table
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {first_line(error)}") from error


def _arrow_batches(file: Place) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file or stream; a local file is mapped into memory."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(open_place(file)) as opened:
            try:
                reader = pa.ipc.open_file(opened)
            except pa.ArrowInvalid:  # as `datasets` writes them
                opened.seek(0)
                yield from pa.ipc.open_stream(opened)
            else:
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Arrow: {first_line(error)}") from error
