"""Sources: files of rows, streamed into samples and rejections; the format is told by suffix and by each row's fields.

`.json` is a list of rows, `.jsonl` a row a line (both: see `row_formats.py`), `.parquet` is RLAIF-V's table. Keys come
from the rows' ids (`id`, in parquet `idx`), or from file stem and row number where there is none or `keys="row"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from llavamod_offline.data.image_folders import ImageFolders
from llavamod_offline.data.json_stream import Advance, stream_array, stream_lines
from llavamod_offline.data.keys import key_from_id, row_key
from llavamod_offline.data.row_formats import json_row_to_sample, parquet_row_to_sample
from llavamod_offline.data.rows import Located, Rejection, RowError
from llavamod_offline.data.sample import KEY_PATTERN, Sample
from llavamod_offline.errors import DataError

KeyRule = Literal["id", "row"]
SUFFIXES = (".json", ".jsonl", ".parquet")

_PARQUET_COLUMNS = ("image", "question", "chosen", "rejected")
_PARQUET_OPTIONAL = ("idx", "ds_name")
_PARQUET_BATCH = 32  # rows, each with its picture


def read_sources(
    files: Sequence[Path],
    *,
    images: Sequence[Path] = (),
    keys: KeyRule = "id",
    advance: Advance = lambda size: None,
) -> Iterator[Located | Rejection]:
    """Stream the rows of `files`, in order, as samples or rejections; `images` are the folders that hold pictures.

    `advance` is told about every piece read, in bytes; over all files they add up to their sizes.
    Errors: `DataError` at once if a file or folder is missing, of an unknown kind or given twice, or two files would
    give the same row keys; while reading, if a file as a whole cannot be read.
    """
    folders = ImageFolders(images)
    seen: dict[Path, Path] = {}
    for file in files:
        if file.is_dir():
            raise DataError(f"source '{file}' is a folder: name the files in it")
        if not file.is_file():
            raise DataError(f"source '{file}': no such file")
        if file.suffix not in SUFFIXES:
            raise DataError(f"source '{file}': its name must end in one of {', '.join(SUFFIXES)}")
        if seen.setdefault(file.resolve(), file) is not file:
            raise DataError(f"source '{file}' is given twice")
    if keys == "row":
        _check_stems(files)
    return (row for file in files for row in _read_file(file, folders, keys, advance))


def _check_stems(files: Sequence[Path]) -> None:
    stems: dict[str, Path] = {}
    for file in files:
        if stems.setdefault(file.stem, file) is not file:
            raise DataError(f"sources '{stems[file.stem]}' and '{file}' give the same row keys: rename one of them")


def _read_file(file: Path, folders: ImageFolders, keys: KeyRule, advance: Advance) -> Iterator[Located | Rejection]:
    for number, row in _opened(file, advance):
        fallback = row_key(file.stem, number)
        key = fallback
        try:
            if isinstance(row, RowError):
                raise row
            key = _key(row, fallback, keys, "idx" if file.suffix == ".parquet" else "id")
            yield Located(_sample(file, row, key, folders), str(file), number)
        except RowError as error:
            yield Rejection(key, error.kind, str(error), str(file), number)


def _opened(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    try:
        yield from _rows(file, advance)
    except OSError as error:
        raise DataError(f"source '{file}': cannot be read: {error.strerror or error}") from error


def _rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    if file.suffix == ".json":
        return enumerate(stream_array(file, advance))
    if file.suffix == ".jsonl":
        return stream_lines(file, advance)
    return enumerate(_stream_parquet(file, advance))


def _sample(file: Path, row: Any, key: str, folders: ImageFolders) -> Sample:
    if file.suffix == ".parquet":
        name = row.get("ds_name")
        return parquet_row_to_sample(row, key=key, source=name if isinstance(name, str) and name else file.stem)
    return json_row_to_sample(row, key=key, source=file.stem, read_image=folders.read)


def _key(row: Any, fallback: str, keys: KeyRule, field: str) -> str:
    identity = row.get(field) if isinstance(row, dict) else None
    if keys == "row" or identity is None:
        key = fallback
    elif isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise RowError("malformed row", f"field '{field}' must be a string or a whole number, and not empty")
    else:
        key = key_from_id(identity)
    if not KEY_PATTERN.fullmatch(key):
        raise RowError("malformed row", f"key of {len(key)} characters, more than 200: number the rows by --keys row")
    return key


def _stream_parquet(file: Path, advance: Advance) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, told = file.stat().st_size, 0
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            missing = [name for name in _PARQUET_COLUMNS if name not in names]
            if missing:
                raise DataError(f"{file}: no column '{missing[0]}': it has {', '.join(names)}")
            columns = [name for name in (*_PARQUET_COLUMNS, *_PARQUET_OPTIONAL) if name in names]
            rows = 0
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                yield from batch.to_pylist()
                rows += len(batch)
                reached = size * rows // table.metadata.num_rows
                advance(reached - told)
                told = reached
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
    advance(size - told)
