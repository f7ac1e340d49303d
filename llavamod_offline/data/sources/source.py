"""What is to be packed: files of rows and folders, local or behind a URL, checked before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.row_files import ROW_FILES, TABLES, tables_and_others
from llavamod_offline.data.sources.system_files import is_system_name
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import DataError
from llavamod_offline.storage.remote import RemoteFolder
from llavamod_offline.storage.remote_file import Place, RemoteFile, place_size
from llavamod_offline.storage.walk import absence, is_utf8, walk_files


@dataclass(frozen=True)
class Source:
    """A file of rows, or a folder; `name` is its rows' `source`, `images` the folders with their images.

    Defaults: for `name`, a parquet row's `ds_name` or `data_source`, or the file's stem; for `images`, those of
    `prepare_sources`.
    `rule`: how a folder's files are read. `below`: its path below the folder of tables that was given, if one was; row
    keys begin with it, and its first part is the default for `name`.
    """

    path: Place
    name: str = ""
    images: tuple[Path, ...] = ()
    rule: ReadRule = field(default_factory=ReadRule)
    below: str = ""

    @property
    def stem(self) -> str:
        """The beginning of the keys of rows without an id."""
        return str(PurePosixPath(self.below).with_suffix("")) if self.below else self.path.stem

    @property
    def default_name(self) -> str:
        """The source of rows that do not name one; for a folder of tables, the data set's part of the path."""
        if not self.below:
            return self.path.stem
        parts = [part for part in PurePosixPath(self.below).parts[:-1] if part != "data"]
        if parts:
            return parts[0]
        if isinstance(self.path, RemoteFile):
            return PurePosixPath(self.path.url.removesuffix(f"/{self.below}")).name
        return self.path.parents[len(PurePosixPath(self.below).parts) - 1].resolve().name


def check_sources(
    files: Sequence[Path | Source], images: Sequence[Path], *, by_row: bool = False
) -> tuple[Source, ...]:
    """All files and folders of samples, those of folders of tables one by one; `images`: their image folders.

    Errors: `DataError` if one is missing, of an unknown kind or given twice, or if two would yield the same keys
    `by_row`.
    """
    given = [Source(file) if isinstance(file, Path) else file for file in files]
    sources = [each for source in given for each in _tables(source)]
    seen: set[Place] = set()
    for file in (source.path for source in sources):
        if isinstance(file, RemoteFile):
            if file.suffix not in ROW_FILES:
                raise DataError(f"source '{file}': its name must end in one of {', '.join(ROW_FILES)}")
            if file in seen:
                raise DataError(f"source '{file}' is given twice: remove one")
            seen.add(file)
            continue
        if file.is_dir() and any(file.glob("*.tar")):
            raise DataError(f"source '{file}': index tars in place with `llavamod-offline index`")
        if not file.exists():
            raise DataError(f"source '{file}': {absence(file)}")
        if not is_utf8(str(file)):
            raise DataError(f"source {str(file)!a}: its name is not UTF-8: rename it")
        if file.suffix not in ROW_FILES and not file.is_dir():
            hint = ": index tars in place with `llavamod-offline index`" if file.suffix == ".tar" else ""
            raise DataError(f"source '{file}': its name must end in one of {', '.join(ROW_FILES)}{hint}")
        if file.resolve() in seen:
            raise DataError(f"source '{file}' is given twice: remove one")
        seen.add(file.resolve())
    if by_row:
        _check_stems(sources)
    found = tuple(replace(source, images=source.images or tuple(images)) for source in sources)
    for folders in {source.images for source in found}:
        ImageFolders(folders)
    return found


def _tables(source: Source) -> list[Source]:
    """The tables below a folder; the source itself if it is not a folder of tables.

    Errors: `DataError` for a folder that also holds rows or samples in other files, which would be left out.
    """
    place = source.path
    if isinstance(place, RemoteFile):
        return [source] if place.suffix in (*ROW_FILES, ".tar") else _remote_tables(source, place)
    try:
        names = list(walk_files(place, is_system_name)) if place.is_dir() else []
    except OSError as error:
        raise DataError(f"source '{error.filename or place}': cannot be read: {error.strerror}") from error
    return [replace(source, path=place / name, below=name) for name in _only_tables(source, names)] or [source]


def _remote_tables(source: Source, folder: RemoteFile) -> list[Source]:
    below = _only_tables(source, sorted(RemoteFolder(folder.url).sizes()))
    if not below:
        raise DataError(
            f"source '{folder}': holds no {' or '.join(TABLES)}, or cannot be listed: name its files one by one"
        )
    url = folder.url.rstrip("/")
    return [replace(source, path=RemoteFile(f"{url}/{name}"), below=name) for name in below]


def _only_tables(source: Source, names: Sequence[str]) -> list[str]:
    """The tables in a folder; none if it is not one of tables."""
    tables, other = tables_and_others(names, source.rule.ignore)
    if tables and other:
        suffix = PurePosixPath(tables[0]).suffix.lstrip(".")
        raise DataError(
            f"source '{source.path}': holds the table '{tables[0]}' and also '{other}', which would be left out: name "
            f"the files one by one, or leave out one kind, as with --ignore {suffix}"
        )
    return tables


def _check_stems(sources: Sequence[Source]) -> None:
    stems: dict[str, Place] = {}
    for source in sources:
        if stems.setdefault(source.stem, source.path) is not source.path:
            first = stems[source.stem]
            raise DataError(f"sources '{first}' and '{source.path}' yield the same row keys: rename one of them")


def describe_sources(files: Sequence[Source]) -> list[Any]:
    """What checked sources hold, by sizes and modification times: equal if an earlier pack may be continued."""
    described = []
    for source in files:
        place = source.path
        if isinstance(place, RemoteFile):
            where, state = str(place), str(place.size())
        else:
            where = str(place.resolve())
            names = walk_files(place, is_system_name) if place.is_dir() else [""]
            found = sorted((name, (place / name).stat()) for name in names if (place / name).exists())
            listed = repr([(name, file.st_size, file.st_mtime_ns) for name, file in found])
            state = hashlib.sha256(listed.encode()).hexdigest()
        folders = [str(folder.resolve()) for folder in source.images]
        rule = [source.rule.caption_prompt, sorted(source.rule.ignore)]
        described.append([str(place), where, source.name, source.below, folders, rule, state])
    return described


def sources_size(files: Sequence[Source]) -> int:
    """The size in bytes of all files of checked sources; folders of samples count as 0. Errors: `StorageError`."""
    places = [source.path for source in files]
    return sum(place_size(place) for place in places if isinstance(place, RemoteFile) or place.is_file())
