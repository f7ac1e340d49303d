"""Check which data sets of a catalogue are on disk, and which files, rows and images are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llavamod_offline.data.parse.row_images import row_images
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources.catalogue import DataSet, broken_links, find_files
from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.json_stream import Advance
from llavamod_offline.data.sources.row_files import ROW_FILES
from llavamod_offline.errors import DataError
from llavamod_offline.plural import counted

_ROUNDED = 0.99  # the smallest share of a rounded row count that passes


@dataclass(frozen=True)
class Finding:
    """The state of one data set on disk; `problems` is empty if it is complete. Counts are None if not counted."""

    name: str
    files: tuple[str, ...]
    bytes: int
    rows: int | None
    rows_expected: str
    images: int | None
    licence: str
    download: str
    note: str
    problems: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


def examine(
    sets: Mapping[str, DataSet],
    root: Path,
    *,
    count: bool = True,
    advance: Advance = lambda size: None,
) -> Iterator[Finding]:
    """Look for each data set below `root`; with `count`, also read its rows and look for every image they name.

    `advance` is called with the size in bytes of each piece read.
    """
    for name, entry in sets.items():
        found = find_files(entry, root)
        paths = [path for _, matches in found for path in matches]
        problems = [f"missing: {root / file}" for file, matches in found if not matches]
        problems += [f"missing: {link}" for link in broken_links(entry, root)]
        folders = [root / folder for folder in entry.images]
        problems += [f"missing: {folder}/" for folder in folders if not folder.is_dir()]
        rows, images = None, None
        if count and paths:
            tally = _Tally([folder for folder in folders if folder.is_dir()])
            try:
                for path in paths:
                    tally.read(path, advance)
                rows, images = tally.rows, tally.images
                problems += tally.problems()
                if all(matches for _, matches in found):
                    problems += _too_few(entry, rows)
            except DataError as error:
                problems.append(f"damaged: {error}")
        yield Finding(
            name=name,
            files=tuple(str(path) for path in paths),
            bytes=sum(path.stat().st_size for path in paths),
            rows=rows,
            rows_expected=_expected(entry),
            images=images,
            licence=entry.licence or "unknown",
            download=entry.download or "unknown",
            note=entry.note,
            problems=tuple(problems),
        )


def render(finding: Finding) -> str:
    """A finding as a few lines of text."""
    state = "MISSING" if finding.problems else "there"
    rows = "not counted" if finding.rows is None else f"{finding.rows:,}"
    lines = [
        f"{finding.name}: {state}",
        f"  rows      {rows} (expected: {finding.rows_expected}), {finding.bytes / 1e6:,.1f} MB",
        *(f"  {problem}" for problem in finding.problems),
        f"  licence   {finding.licence}",
        f"  download  {finding.download}",
    ]
    if finding.note:
        lines.append(f"  note      {finding.note}")
    return "\n".join(lines)


class _Tally:
    """Counts rows and the images they name."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = ImageFolders(folders)
        self.rows = 0
        self.images = 0
        self._unreadable = 0
        self._missing: Counter[str] = Counter()

    def read(self, path: Path, advance: Advance) -> None:
        """Count one file. Errors: `DataError` if it cannot be read to its end."""
        try:
            for _, row in ROW_FILES[path.suffix].outline(path, advance):
                self.rows += 1
                self._read_row(row)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    def problems(self) -> list[str]:
        """What is missing; images are grouped by the first two folders of their names."""
        lines = [f"unreadable: {counted(self._unreadable, 'row')}"] if self._unreadable else []
        if self._missing:
            places = ", ".join(f"{place} ({times:,})" for place, times in self._missing.most_common(6))
            more = f" and {len(self._missing) - 6} more places" if len(self._missing) > 6 else ""
            lines.append(f"missing: {self._missing.total():,} of {self.images:,} images: {places}{more}")
        return lines

    def _read_row(self, row: Any) -> None:
        if isinstance(row, RowError) or not isinstance(row, dict):
            self._unreadable += 1
            return
        for name in ("image", "images"):
            try:
                images = row_images(row.get(name), name)
            except RowError:
                self._unreadable += 1
                continue
            for image in images:
                self.images += 1
                if image.content is None and not self._folders.has(image.name):
                    self._missing["/".join(image.name.split("/")[:-1][:2]) or "."] += 1


def _too_few(entry: DataSet, rows: int) -> list[str]:
    if entry.rows is not None and rows != entry.rows:
        return [f"rows: {rows:,} instead of {entry.rows:,}: another version, or truncated"]
    if entry.rows_about is not None and rows < _ROUNDED * entry.rows_about:
        return [f"rows: {rows:,} instead of about {entry.rows_about:,}: another version, or truncated"]
    return []


def _expected(entry: DataSet) -> str:
    if entry.rows is not None:
        return f"{entry.rows:,}"
    return "unknown" if entry.rows_about is None else f"about {entry.rows_about:,}"
