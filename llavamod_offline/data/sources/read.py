"""Sources: files of rows, streamed into samples and rejections; the format is told by suffix and by each row's fields.

`.json` is a list of rows, `.jsonl` a row a line (both: see `row_formats.py`), `.parquet` is RLAIF-V's table; a folder
has a sample's text beside its images (see `tar_samples.py`). Keys come from the rows' ids (`id`, in parquet `idx`, in
a folder the files' names), or from file stem and row number where there is none or `keys="row"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llavamod_offline.data.keys import key_from_id, row_key
from llavamod_offline.data.pack.prepare import PreparedSources, prepare
from llavamod_offline.data.pack.process_map import map_in_order
from llavamod_offline.data.pack.shrink import shrink_sample
from llavamod_offline.data.parse.row_formats import json_row_to_sample, parquet_row_to_sample
from llavamod_offline.data.rows import Located, RejectedRow, RowError
from llavamod_offline.data.sample import KEY_PATTERN, Sample
from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.json_stream import Advance, stream_array, stream_lines
from llavamod_offline.data.sources.sample_folders import FileGroup, list_groups, read_files
from llavamod_offline.data.sources.tar_samples import ReadRule, read_group
from llavamod_offline.errors import DataError

KeyRule = Literal["id", "row"]
SUFFIXES = (".json", ".jsonl", ".parquet")

_PARQUET_COLUMNS = ("image", "question", "chosen", "rejected")
_PARQUET_OPTIONAL = ("idx", "ds_name")
_PARQUET_BATCH = 32  # rows, each with its image
_CHUNK = 16  # rows that a process works on at a time


@dataclass(frozen=True)
class Source:
    """A file of rows, or a folder of samples; `name` is their `source`, `images` the folders that images are in.

    Without a name, the source is the file's stem, or what a parquet row's `ds_name` says. Without folders, those that
    `read_sources` is given. `rule`: how a folder's files are read.
    """

    path: Path
    name: str = ""
    images: tuple[Path, ...] = ()
    rule: ReadRule = field(default_factory=ReadRule)


@dataclass(frozen=True)
class _SourceRow:
    """A row as it was read, its number, and which of the sources it is from."""

    source: int
    number: int
    content: Any


def read_sources(
    files: Sequence[Path | Source],
    *,
    images: Sequence[Path] = (),
    keys: KeyRule = "id",
    advance: Advance = lambda size: None,
) -> Iterator[Located | RejectedRow]:
    """Stream the rows of `files`, in order, as samples or rejections; `images` are the folders that hold images.

    `advance` is told about every piece read, in bytes; over all files they add up to their sizes.
    Errors: `DataError` at once if a file or folder is missing, of an unknown kind or given twice, or two files would
    give the same row keys; while reading, if a file as a whole cannot be read.
    """
    sources = _checked(files, images, keys)
    reader = _RowReader(sources, keys, None)
    return (reader.located(row) for row in _all_rows(sources, advance))


def prepare_sources(
    files: Sequence[Path | Source],
    *,
    images: Sequence[Path] = (),
    keys: KeyRule = "id",
    advance: Advance = lambda size: None,
    max_side: int | None = None,
    workers: int = 1,
) -> Iterator[PreparedSources | RejectedRow]:
    """As `read_sources`, the samples ready to be written; the result is the same for every number of `workers`.

    They are processes that read and decode images. `max_side`: the length in pixels beyond which images are made
    smaller (None: every image keeps its bytes). Further errors: those of `map_in_order`.
    """
    sources = _checked(files, images, keys)
    reader = _RowReader(sources, keys, max_side)
    return map_in_order(reader.prepared, _all_rows(sources, advance), workers=workers, chunk=_CHUNK)


def _checked(files: Sequence[Path | Source], images: Sequence[Path], keys: KeyRule) -> tuple[Source, ...]:
    sources = [Source(file) if isinstance(file, Path) else file for file in files]
    seen: dict[Path, Path] = {}
    for file in (source.path for source in sources):
        if file.is_dir() and any(file.glob("*.tar")):
            raise DataError(f"source '{file}': tars are indexed in place with `llavamod-offline index`")
        if not file.exists():
            raise DataError(f"source '{file}': no such file")
        if file.suffix not in SUFFIXES and not file.is_dir():
            hint = ": tars are indexed in place with `llavamod-offline index`" if file.suffix == ".tar" else ""
            raise DataError(f"source '{file}': its name must end in one of {', '.join(SUFFIXES)}{hint}")
        if seen.setdefault(file.resolve(), file) is not file:
            raise DataError(f"source '{file}' is given twice")
    if keys == "row":
        _check_stems([source.path for source in sources])
    found = tuple(replace(source, images=source.images or tuple(images)) for source in sources)
    for folders in {source.images for source in found}:
        ImageFolders(folders)
    return found


def _check_stems(files: Sequence[Path]) -> None:
    stems: dict[str, Path] = {}
    for file in files:
        if stems.setdefault(file.stem, file) is not file:
            raise DataError(f"sources '{stems[file.stem]}' and '{file}' give the same row keys: rename one of them")


class _RowReader:
    """Rows → samples, and samples that are ready to be written; may be pickled."""

    def __init__(self, sources: tuple[Source, ...], keys: KeyRule, max_side: int | None) -> None:
        self._sources, self._keys, self._max_side = sources, keys, max_side
        self._folders = [ImageFolders(source.images) for source in sources]

    def located(self, row: _SourceRow) -> Located | RejectedRow:
        """The sample of a row, or why there is none."""
        source = self._sources[row.source]
        file, key = source.path, row_key(source.path.stem, row.number)
        try:
            if isinstance(row.content, RowError):
                raise row.content
            if isinstance(row.content, FileGroup):
                key = key if self._keys == "row" else _key({"id": row.content.key}, key, "id", "id")
                return Located(self._from_files(source, row.content, key), str(file), row.number)
            key = _key(row.content, key, self._keys, "idx" if file.suffix == ".parquet" else "id")
            return Located(_sample(source, row.content, key, self._folders[row.source]), str(file), row.number)
        except RowError as error:
            return RejectedRow(key, error.kind, str(error), str(file), row.number)

    def _from_files(self, source: Source, group: FileGroup, key: str) -> Sample:
        name = source.name or source.path.resolve().name
        sample, _, _ = read_group(read_files(source.path, group), key, name, source.rule)
        sample = replace(sample, source=name) if source.name else sample
        return replace(sample, key=key) if self._keys == "row" else sample  # one of this project's brings its key

    def prepared(self, rows: list[_SourceRow]) -> list[PreparedSources | RejectedRow]:
        """The same of several rows, ready to be written."""
        return [row if isinstance(row, RejectedRow) else self._prepare(row) for row in map(self.located, rows)]

    def _prepare(self, located: Located) -> PreparedSources:
        if self._max_side is None:
            return prepare(located.sample, located.file, located.row)
        sample, original_sizes = shrink_sample(located.sample, self._max_side)
        return prepare(sample, located.file, located.row, original_sizes)


def _all_rows(sources: tuple[Source, ...], advance: Advance) -> Iterator[_SourceRow]:
    for ordinal, source in enumerate(sources):
        try:
            for number, content in _rows(source.path, advance):
                yield _SourceRow(ordinal, number, content)
        except OSError as error:
            raise DataError(f"source '{source.path}': cannot be read: {error.strerror or error}") from error


def _rows(file: Path, advance: Advance) -> Iterator[tuple[int, Any]]:
    if file.is_dir():
        return enumerate(list_groups(file))
    if file.suffix == ".json":
        return enumerate(stream_array(file, advance))
    if file.suffix == ".jsonl":
        return stream_lines(file, advance)
    return enumerate(_stream_parquet(file, advance))


def _sample(source: Source, row: Any, key: str, folders: ImageFolders) -> Sample:
    if source.path.suffix == ".parquet":
        named = row.get("ds_name")
        name = source.name or (named if isinstance(named, str) and named else source.path.stem)
        return parquet_row_to_sample(row, key=key, source=name)
    return json_row_to_sample(row, key=key, source=source.name or source.path.stem, read_image=folders.read)


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
