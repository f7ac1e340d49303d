"""Files of rows, by suffix: how rows are streamed and counted; `row_formats.py` turns them into samples.

To add a kind of file, write its functions and enter them in `ROW_FILES`, which packing, catalogues and the doctor read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from llavamod_offline.data.sources.json_stream import Advance, stream_array, stream_lines
from llavamod_offline.data.sources.tables import (
    IDS,
    SOURCES,
    TableRows,
    arrow_outline,
    arrow_rows,
    parquet_outline,
    parquet_rows,
)
from llavamod_offline.errors import DataError
from llavamod_offline.storage.remote_file import Place

Rows = Callable[[Place, Advance], Iterator[tuple[int, Any]]]  # row numbers and contents; a bad row is a `RowError`
TABLES = (".parquet", ".arrow")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_ABOUT_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_TOGETHER = 16  # rows of a text file that are passed on together


@dataclass(frozen=True)
class TextRows:
    """Some rows of a text file: their numbers and contents."""

    rows: list[tuple[int, Any]]

    def listed(self) -> list[tuple[int, Any]]:
        """Their numbers and contents."""
        return self.rows


@dataclass(frozen=True)
class RowFile:
    """How files of one suffix are read; every valid row is a mapping of fields.

    `rows`: a file's rows from a number on, some at a time; `outline`: as much of them as counting needs, without images
    stored in the file. `id_fields`: where a row's id may be, `source_fields`: where its source may be. `holds_images`:
    whether rows usually hold their images, so that no image folders are needed.
    """

    rows: Callable[[Place, Advance, int], Iterator[TextRows | TableRows]]
    outline: Rows
    id_fields: tuple[str, ...] = ("id",)
    source_fields: tuple[str, ...] = ()
    holds_images: bool = False


def _array(file: Place, advance: Advance) -> Iterator[tuple[int, Any]]:
    return enumerate(stream_array(file, advance))


def _text(rows: Rows) -> Callable[[Place, Advance, int], Iterator[TextRows]]:
    def some_at_a_time(file: Place, advance: Advance, start: int) -> Iterator[TextRows]:
        together: list[tuple[int, Any]] = []
        try:
            for row in rows(file, advance):
                if row[0] >= start:
                    together.append(row)
                if len(together) == _TOGETHER:
                    yield TextRows(together)
                    together = []
        except DataError:
            if together:
                yield TextRows(together)  # what precedes the fault is valid
            raise
        if together:
            yield TextRows(together)

    return some_at_a_time


def tables_and_others(names: Sequence[str], ignore: Collection[str]) -> tuple[list[str], str]:
    """The parquet and Arrow files among a folder's `names`, and another file that holds rows or a sample ("": none).

    Files with a suffix in `ignore`, and those that `datasets` writes about its tables, are neither.
    """
    names = [name for name in names if PurePosixPath(name).suffix.lstrip(".").lower() not in ignore]
    tables = [name for name in names if name.endswith(TABLES)]
    pictured = {str(PurePosixPath(name).with_suffix("")) for name in names if name.lower().endswith(_PICTURES)}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix in (".json", ".jsonl") and path.name not in _ABOUT_TABLES:
            return tables, name
        if path.suffix in (".txt", ".cls") and str(path.with_suffix("")) in pictured:
            return tables, name
    return tables, ""


ROW_FILES = {
    ".json": RowFile(_text(_array), _array),
    ".jsonl": RowFile(_text(stream_lines), stream_lines),
    ".parquet": RowFile(parquet_rows, parquet_outline, IDS, SOURCES, holds_images=True),
    ".arrow": RowFile(arrow_rows, arrow_outline, IDS, SOURCES, holds_images=True),
}
