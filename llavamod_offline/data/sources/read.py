"""Sources: files of rows (see `row_files.py`), folders of tables or samples, streamed into samples and rejections.

A folder of samples holds each sample's text beside its images (see `tars/tar_samples.py`). Keys come from the rows' ids
(`id`, in parquet also `idx`, in a folder the files' names), or from file stem and row number if a row has no id or
`keys="row"`. A few files are read ahead in threads; processes turn their rows into samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavamod_offline.data.images import MAX_IMAGE_SIDE
from llavamod_offline.data.keys import key_from_id, row_key
from llavamod_offline.data.pack.prepare import PreparedSources, prepare
from llavamod_offline.data.pack.process_map import map_in_order
from llavamod_offline.data.pack.shrink import shrink_sample
from llavamod_offline.data.parse.row_formats import one_for_each_rejected, row_to_sample
from llavamod_offline.data.rows import Located, RejectedRow, RowError, RowPlace
from llavamod_offline.data.sample import KEY_PATTERN, Sample
from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.json_stream import Advance
from llavamod_offline.data.sources.read_ahead import read_ahead
from llavamod_offline.data.sources.row_files import ROW_FILES, TextRows
from llavamod_offline.data.sources.sample_folders import FileGroup, list_groups, read_files
from llavamod_offline.data.sources.source import Source, check_sources
from llavamod_offline.data.tars.tar_samples import read_group
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.storage.remote_file import Place, place_size

if TYPE_CHECKING:
    from llavamod_offline.data.sources.tables import TableRows

KeyRule = Literal["id", "row"]
_TOGETHER = 16  # samples of a folder that are passed to a process together


@dataclass(frozen=True)
class _SourceRow:
    """A row as read, its number, and the ordinal of its source."""

    source: int
    number: int
    content: Any


@dataclass(frozen=True)
class _Piece:
    """Some rows of a source, given by its ordinal."""

    source: int
    rows: TextRows | TableRows


def prepare_sources(
    files: Sequence[Path | Source],
    *,
    images: Sequence[Path] = (),
    keys: KeyRule = "id",
    advance: Advance = lambda size: None,
    max_side: int | None = None,
    workers: int = 1,
    start: RowPlace | None = None,
) -> Iterator[PreparedSources | RejectedRow]:
    """Stream the rows of `files`, in order, as samples ready to be written, or as rejections.

    `images`: folders with the images. `advance` is called with the size in bytes of every piece read; these add up to
    the sizes of all files. `max_side`: length in pixels beyond which images are shrunk (None: none are). `workers`:
    processes that make samples and decode images; the result does not depend on their number. `start`: where to begin,
    if not with the first row.
    Errors: `DataError` at once if a file or folder is missing, of an unknown kind or given twice, or if two files would
    yield the same row keys; while reading, if a file cannot be read at all; those of `map_in_order`.
    """
    if max_side is not None and max_side > MAX_IMAGE_SIDE:
        raise ConfigError(f"--max-side {max_side}: at most {MAX_IMAGE_SIDE}, the longest side that can be trained on")
    sources = check_sources(files, images, by_row=keys == "row")
    reader = _RowReader(sources, keys, max_side)
    outcomes = map_in_order(reader.prepared, _pieces(sources, advance, start), workers=workers, chunk=1)
    if start is None:
        return outcomes
    # Some samples of the row at which an earlier pack stopped may already exist.
    return (each for n, each in enumerate(outcomes) if n >= start.done or not _is_at(each, start))


def _is_at(outcome: PreparedSources | RejectedRow, place: RowPlace) -> bool:
    return (outcome.file, outcome.row) == (place.file, place.row)


class _RowReader:
    """Rows → samples → samples ready to be written; picklable."""

    def __init__(self, sources: tuple[Source, ...], keys: KeyRule, max_side: int | None) -> None:
        self._sources, self._keys, self._max_side = sources, keys, max_side
        self._folders = [ImageFolders(source.images, near=_near(source.path)) for source in sources]

    def _located(self, row: _SourceRow) -> Iterator[Located | RejectedRow]:
        """The sample of a row, or why it has none; several samples for several rejected answers."""
        content, key = row.content, row_key(self._sources[row.source].stem, row.number)
        rows = one_for_each_rejected(content)
        for number, each in enumerate(rows):
            yield self._outcome(replace(row, content=each), key, f"-{number}" if len(rows) > 1 else "")

    def _outcome(self, row: _SourceRow, key: str, suffix: str) -> Located | RejectedRow:
        source = self._sources[row.source]
        file = source.path
        try:
            if isinstance(row.content, RowError):
                raise row.content
            if isinstance(row.content, FileGroup):
                key = key if self._keys == "row" else _key({"id": row.content.key}, key, "id", ("id",))
                return Located(self._from_files(source, row.content, key), str(file), row.number)
            kind = ROW_FILES[file.suffix]
            key = _key(row.content, key, self._keys, kind.id_fields) + suffix
            name = source.name or _named_source(row.content, kind.source_fields) or source.default_name
            folders = self._folders[row.source]
            read_image = folders.read if folders.folders or not kind.holds_images else _unheld
            sample = row_to_sample(row.content, key=key, source=name, read_image=read_image, max_side=self._max_side)
            return Located(sample, str(file), row.number)
        except RowError as error:
            if isinstance(row.content, FileGroup):  # the file, because keys may be numbers
                assert isinstance(file, Path)
                file = file / row.content.files[0][1]
            return RejectedRow(key, error.kind, str(error), str(file), row.number, error.image)

    def _from_files(self, source: Source, group: FileGroup, key: str) -> Sample:
        assert isinstance(source.path, Path)
        name = source.name or source.path.resolve().name
        sample, _, _ = read_group(read_files(source.path, group), key, name, source.rule, self._max_side)
        sample = replace(sample, source=name) if source.name else sample
        return replace(sample, key=key) if self._keys == "row" else sample  # our own samples keep theirs

    def prepared(self, pieces: list[_Piece]) -> list[PreparedSources | RejectedRow]:
        """The samples of several rows, ready to be written, or why they have none."""
        rows = (_SourceRow(piece.source, *row) for piece in pieces for row in piece.rows.listed())
        outcomes = (outcome for row in rows for outcome in self._located(row))
        return [row if isinstance(row, RejectedRow) else self._prepare(row) for row in outcomes]

    def _prepare(self, located: Located) -> PreparedSources:
        if self._max_side is None:
            return prepare(located.sample, located.file, located.row)
        sample, original_sizes = shrink_sample(located.sample, self._max_side)
        return prepare(sample, located.file, located.row, original_sizes)


def _pieces(sources: tuple[Source, ...], advance: Advance, start: RowPlace | None) -> Iterator[_Piece]:
    """The rows of all sources from a place on, some at a time; files before that place only advance."""
    first = next((n for n, source in enumerate(sources) if start and str(source.path) == start.file), 0)
    for source in sources[:first]:
        advance(0 if isinstance(source.path, Path) and source.path.is_dir() else place_size(source.path))
    makers = [
        partial(_pieces_of, n, source, start.row if start and n == first else 0)
        for n, source in enumerate(sources)
        if n >= first
    ]
    return read_ahead(makers, advance)


def _pieces_of(ordinal: int, source: Source, start: int, advance: Advance) -> Iterator[_Piece]:
    place = source.path
    try:
        if isinstance(place, Path) and place.is_dir():
            groups = ((number, group) for number, group in enumerate(list_groups(place)) if number >= start)
            while together := list(islice(groups, _TOGETHER)):
                yield _Piece(ordinal, TextRows(together))
            return
        for rows in ROW_FILES[place.suffix].rows(place, advance, start):
            yield _Piece(ordinal, rows)
    except OSError as error:
        raise DataError(f"source '{place}': cannot be read: {error.strerror or error}") from error


def _near(place: Place) -> Path | None:
    return place.parent if isinstance(place, Path) else None


def _unheld(name: str) -> bytes:
    reason = f"image '{name}': the row holds no bytes of it, and no --images folder is given"
    raise RowError("missing image", reason, name)


def _named_source(row: Any, fields: tuple[str, ...]) -> str:
    return next((row[field] for field in fields if isinstance(row.get(field), str) and row[field]), "")


def _key(row: Any, fallback: str, keys: KeyRule, fields: tuple[str, ...]) -> str:
    field = next((name for name in fields if isinstance(row, dict) and row.get(name) is not None), "")
    identity = row[field] if field else None
    if keys == "row" or identity is None:
        key = fallback
    elif isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise RowError("malformed row", f"field '{field}' must be a non-empty string or a whole number")
    else:
        key = key_from_id(identity)
    if not KEY_PATTERN.fullmatch(key):
        raise RowError("malformed row", f"key of {len(key)} characters, more than 200: number the rows with --keys row")
    return key
