"""Sources: files of rows (see `row_files.py`), folders of tables or samples, streamed into samples and rejections.

A folder holds each sample's text beside its images (see `tar_samples.py`). Keys come from the rows' ids (`id`, in
parquet also `idx`, in a folder the files' names), or from file stem and row number if a row has no id or `keys="row"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llavamod_offline.data.images import MAX_IMAGE_SIDE
from llavamod_offline.data.keys import key_from_id, row_key
from llavamod_offline.data.pack.prepare import PreparedSources, prepare
from llavamod_offline.data.pack.process_map import map_in_order
from llavamod_offline.data.pack.shrink import shrink_sample
from llavamod_offline.data.parse.row_formats import one_for_each_rejected, row_to_sample
from llavamod_offline.data.rows import Located, RejectedRow, RowError
from llavamod_offline.data.sample import KEY_PATTERN, Sample
from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.json_stream import Advance
from llavamod_offline.data.sources.row_files import ROW_FILES, tables_below
from llavamod_offline.data.sources.sample_folders import FileGroup, list_groups, read_files
from llavamod_offline.data.tars.tar_samples import ReadRule, read_group
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.storage.walk import absence

KeyRule = Literal["id", "row"]
_CHUNK = 16  # rows passed to a process at a time


@dataclass(frozen=True)
class Source:
    """A file of rows, or a folder of samples; `name` is their `source`, `images` the folders with their images.

    Defaults: for `name`, a parquet row's `ds_name` or `data_source`, or the file's stem; for `images`, those of
    `prepare_sources`.
    `rule`: how a folder's files are read. `below`: its path below the folder of tables that was given, if one was; row
    keys begin with it, and its first part is the default for `name`.
    """

    path: Path
    name: str = ""
    images: tuple[Path, ...] = ()
    rule: ReadRule = field(default_factory=ReadRule)
    below: str = ""

    @property
    def stem(self) -> str:
        """What the keys of rows without id begin with."""
        return str(PurePosixPath(self.below).with_suffix("")) if self.below else self.path.stem

    @property
    def default_name(self) -> str:
        """The source of rows that do not name it: of a folder of tables, the part of the data set."""
        if not self.below:
            return self.path.stem
        parts = [part for part in PurePosixPath(self.below).parts[:-1] if part != "data"]
        return parts[0] if parts else self.path.parents[len(PurePosixPath(self.below).parts) - 1].resolve().name


@dataclass(frozen=True)
class _SourceRow:
    """A row as read, its number, and the ordinal of its source."""

    source: int
    number: int
    content: Any


def prepare_sources(
    files: Sequence[Path | Source],
    *,
    images: Sequence[Path] = (),
    keys: KeyRule = "id",
    advance: Advance = lambda size: None,
    max_side: int | None = None,
    workers: int = 1,
) -> Iterator[PreparedSources | RejectedRow]:
    """Stream the rows of `files`, in order, as samples ready to be written, or as rejections.

    `images`: folders with the images. `advance` is called with the size in bytes of every piece read; over
    all files these add up to their sizes. `max_side`: length in pixels beyond which images are shrunk (None: none are).
    `workers`: processes that read and decode images; the result does not depend on their number.
    Errors: `DataError` at once if a file or folder is missing, of an unknown kind or given twice, or if two files would
    yield the same row keys; while reading, if a file cannot be read at all; those of `map_in_order`.
    """
    if max_side is not None and max_side > MAX_IMAGE_SIDE:
        raise ConfigError(f"--max-side {max_side}: at most {MAX_IMAGE_SIDE}, the longest side that can be trained on")
    sources = _checked(files, images, keys)
    reader = _RowReader(sources, keys, max_side)
    return map_in_order(reader.prepared, _all_rows(sources, advance), workers=workers, chunk=_CHUNK)


def _checked(files: Sequence[Path | Source], images: Sequence[Path], keys: KeyRule) -> tuple[Source, ...]:
    given = [Source(file) if isinstance(file, Path) else file for file in files]
    sources = [each for source in given for each in _tables(source)]
    seen: dict[Path, Path] = {}
    for file in (source.path for source in sources):
        if file.is_dir() and any(file.glob("*.tar")):
            raise DataError(f"source '{file}': index tars in place with `llavamod-offline index`")
        if not file.exists():
            raise DataError(f"source '{file}': {absence(file)}")
        if file.suffix not in ROW_FILES and not file.is_dir():
            hint = ": index tars in place with `llavamod-offline index`" if file.suffix == ".tar" else ""
            raise DataError(f"source '{file}': its name must end in one of {', '.join(ROW_FILES)}{hint}")
        if seen.setdefault(file.resolve(), file) is not file:
            raise DataError(f"source '{file}' is given twice: remove one")
    if keys == "row":
        _check_stems(sources)
    found = tuple(replace(source, images=source.images or tuple(images)) for source in sources)
    for folders in {source.images for source in found}:
        ImageFolders(folders)
    return found


def _tables(source: Source) -> list[Source]:
    """The tables below a folder; the source itself if it is none of tables."""
    try:
        below = tables_below(source.path) if source.path.is_dir() else []
    except OSError as error:
        raise DataError(f"source '{error.filename or source.path}': cannot be read: {error.strerror}") from error
    return [replace(source, path=source.path / name, below=name) for name in below] or [source]


def _check_stems(sources: Sequence[Source]) -> None:
    stems: dict[str, Path] = {}
    for source in sources:
        if stems.setdefault(source.stem, source.path) is not source.path:
            first = stems[source.stem]
            raise DataError(f"sources '{first}' and '{source.path}' yield the same row keys: rename one of them")


class _RowReader:
    """Rows → samples → samples ready to be written; picklable."""

    def __init__(self, sources: tuple[Source, ...], keys: KeyRule, max_side: int | None) -> None:
        self._sources, self._keys, self._max_side = sources, keys, max_side
        self._folders = [ImageFolders(source.images, near=source.path.parent) for source in sources]

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
            if isinstance(row.content, FileGroup):  # the file, as keys may be numbers
                file = file / row.content.files[0][1]
            return RejectedRow(key, error.kind, str(error), str(file), row.number, error.image)

    def _from_files(self, source: Source, group: FileGroup, key: str) -> Sample:
        name = source.name or source.path.resolve().name
        sample, _, _ = read_group(read_files(source.path, group), key, name, source.rule, self._max_side)
        sample = replace(sample, source=name) if source.name else sample
        return replace(sample, key=key) if self._keys == "row" else sample  # our own samples keep theirs

    def prepared(self, rows: list[_SourceRow]) -> list[PreparedSources | RejectedRow]:
        """The samples of several rows, ready to be written, or why they have none."""
        outcomes = (outcome for row in rows for outcome in self._located(row))
        return [row if isinstance(row, RejectedRow) else self._prepare(row) for row in outcomes]

    def _prepare(self, located: Located) -> PreparedSources:
        if self._max_side is None:
            return prepare(located.sample, located.file, located.row)
        sample, original_sizes = shrink_sample(located.sample, self._max_side)
        return prepare(sample, located.file, located.row, original_sizes)


def _all_rows(sources: tuple[Source, ...], advance: Advance) -> Iterator[_SourceRow]:
    for ordinal, source in enumerate(sources):
        try:
            path = source.path
            rows = enumerate(list_groups(path)) if path.is_dir() else ROW_FILES[path.suffix].rows(path, advance)
            yield from (_SourceRow(ordinal, number, content) for number, content in rows)
        except OSError as error:
            raise DataError(f"source '{source.path}': cannot be read: {error.strerror or error}") from error


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
