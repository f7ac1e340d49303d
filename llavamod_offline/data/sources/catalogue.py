"""The list of data sets of each stage (`sources.yaml`): what to download, and how to pack it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llavamod_offline.config import load_config
from llavamod_offline.data.sources.row_files import ROW_FILES
from llavamod_offline.data.sources.source import Source
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.storage.walk import absence, no_folder, walk_files

SHIPPED = Path(__file__).with_name("sources.yaml")


@dataclass(frozen=True)
class DataSet:
    """A data set as downloaded; `files` (or patterns) and `images` are paths below one root folder.

    `rows`: the exact count; `rows_about`: a count that was published as a rounded figure; `weight`: how often training
    sees its samples. None: unknown.
    """

    files: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    rows: int | None = None
    rows_about: int | None = None
    weight: float = 1.0
    licence: str | None = None
    download: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Catalogue:
    """Data sets by name, and each stage's names."""

    sources: dict[str, DataSet] = field(default_factory=dict)
    stages: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage, names in self.stages.items():
            unknown = [name for name in names if name not in self.sources]
            if unknown:
                raise ConfigError(f"stage '{stage}': source '{unknown[0]}' is unknown: list it under sources")
        for name, entry in self.sources.items():
            _check(name, entry)

    def of_stage(self, stage: str | None) -> dict[str, DataSet]:
        """The data sets of a stage, or all. Errors: `ConfigError` naming the known stages."""
        if stage is None:
            return dict(self.sources)
        if stage not in self.stages:
            raise ConfigError(f"stage '{stage}' is unknown: choose one of {', '.join(self.stages)}")
        return {name: self.sources[name] for name in self.stages[stage]}


def read_catalogue(file: Path = SHIPPED) -> Catalogue:
    """Read a file like the shipped `sources.yaml`. Errors: `ConfigError` naming the file or key."""
    return load_config(Catalogue, [file])


def find_files(entry: DataSet, root: Path) -> list[tuple[str, list[Path]]]:
    """Each file or pattern with the files found, sorted by name."""
    return [(file, sorted(path for path in _matches(root, file) if path.is_file())) for file in entry.files]


def broken_links(entry: DataSet, root: Path) -> list[str]:
    """The broken links that match a data set's files, with their targets."""
    paths = [path for file in entry.files for path in _matches(root, file)]
    return [f"{path} is {absence(path)}" for path in paths if path.is_symlink() and not path.exists()]


def _matches(root: Path, pattern: str) -> Iterator[Path]:
    """Like `Path.glob`, but `**/` also follows links to folders."""
    above, stars, name = pattern.partition("**/")
    if not stars:
        yield from root.glob(pattern)
        return
    for folder in root.glob(above) if above else [root]:
        if folder.is_dir():
            yield from (folder / file for file in walk_files(folder) if PurePosixPath(file).match(name))


def check_root(root: Path) -> None:
    """Refuse a `--root` that is no folder. Errors: `ConfigError`."""
    if not root.is_dir():
        raise ConfigError(f"--root {root}: {no_folder(root)}")


def stage_sources(
    catalogue: Catalogue, stage: str, root: Path
) -> tuple[list[Source], dict[str, float], dict[str, str]]:
    """The files of a stage, ready to be packed, the weights other than 1, and the licences that are known.

    Errors: `DataError` naming the first missing file or folder.
    """
    sources, weights, licences = [], {}, {}
    for name, entry in catalogue.of_stage(stage).items():
        found = find_files(entry, root)
        broken = broken_links(entry, root)
        if broken:
            raise DataError(f"source '{name}': {broken[0]}: remove it, or restore what it leads to")
        absent = [file for file, paths in found if not paths]
        absent += [folder for folder in entry.images if not (root / folder).is_dir()]
        if absent:
            raise DataError(f"source '{name}': {root / absent[0]} is missing: `llavamod-offline doctor` lists the rest")
        folders = tuple(root / folder for folder in entry.images)
        sources += [
            Source(path, name, folders, below=_below(root, file, path)) for file, paths in found for path in paths
        ]
        if entry.weight != 1.0:
            weights[name] = entry.weight
        if entry.licence is not None:
            licences[name] = entry.licence
    return sources, weights, licences


def _below(root: Path, pattern: str, path: Path) -> str:
    """A file's path below the first folder that its pattern leaves open, to tell apart equal names in several."""
    parts = PurePosixPath(pattern).parts
    fixed = next((n for n, part in enumerate(parts) if "*" in part or "?" in part or "[" in part), len(parts))
    return path.relative_to(root.joinpath(*parts[:fixed])).as_posix() if fixed < len(parts) - 1 else ""


def _check(name: str, entry: DataSet) -> None:
    if not entry.files:
        raise ConfigError(f"source '{name}': names no files: add some")
    for path in (*entry.files, *entry.images):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ConfigError(f"source '{name}': '{path}' must be a path below the root folder")
    for path in entry.files:
        if PurePosixPath(path).suffix not in ROW_FILES:
            raise ConfigError(f"source '{name}': '{path}' must end in one of {', '.join(ROW_FILES)}")
