"""What is on a disk of the data sets in a catalogue, and what is missing: files, rows, images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources.catalogue import DataSet, find_files
from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.json_stream import Advance, stream_array, stream_lines
from llavamod_offline.errors import DataError

_ROUNDED = 0.99  # of a rounded count of rows


@dataclass(frozen=True)
class Finding:
    """What is there of one data set; `problems` is empty if that is all. Counts are None where nothing was counted."""

    name: str
    files: tuple[str, ...]
    bytes: int
    rows: int | None
    rows_expected: str
    pictures: int | None
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
    """Look for each data set below `root`; with `count` read its rows, and look for every image that they name.

    Nothing is changed. `advance` is told how many bytes of the files were read.
    """
    for name, entry in sets.items():
        found = find_files(entry, root)
        paths = [path for _, matches in found for path in matches]
        problems = [f"missing: {root / file}" for file, matches in found if not matches]
        folders = [root / folder for folder in entry.images]
        problems += [f"missing: {folder}/" for folder in folders if not folder.is_dir()]
        rows, pictures = None, None
        if count and paths:
            tally = _Tally([folder for folder in folders if folder.is_dir()])
            try:
                for path in paths:
                    tally.read(path, advance)
                rows, pictures = tally.rows, tally.pictures
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
            pictures=pictures,
            licence=entry.licence or "unknown",
            download=entry.download or "unknown",
            note=entry.note,
            problems=tuple(problems),
        )


def render(finding: Finding) -> str:
    """A finding in a few lines."""
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
    """Counts rows and the images that they name."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = ImageFolders(folders)
        self.rows = 0
        self.pictures = 0
        self._unreadable = 0
        self._missing: Counter[str] = Counter()

    def read(self, path: Path, advance: Advance) -> None:
        """Count one file. Errors: `DataError` if it cannot be read to its end."""
        if path.suffix == ".parquet":
            self._read_parquet(path, advance)
            return
        lines = path.suffix == ".jsonl"
        rows = (row for _, row in stream_lines(path, advance)) if lines else stream_array(path, advance)
        try:
            for row in rows:
                self.rows += 1
                self._read_row(row)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    def problems(self) -> list[str]:
        """What is missing, images by the first two folders of their names."""
        lines = [f"unreadable: {self._unreadable:,} rows are no JSON objects"] if self._unreadable else []
        if self._missing:
            places = ", ".join(f"{place} ({times:,})" for place, times in self._missing.most_common(6))
            more = f" and {len(self._missing) - 6} more places" if len(self._missing) > 6 else ""
            lines.append(f"missing: {self._missing.total():,} of {self.pictures:,} pictures: {places}{more}")
        return lines

    def _read_parquet(self, path: Path, advance: Advance) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as table:
                self.rows += table.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
        advance(path.stat().st_size)

    def _read_row(self, row: Any) -> None:
        if isinstance(row, RowError) or not isinstance(row, dict):
            self._unreadable += 1
            return
        names = row.get("image")
        for name in [names] if isinstance(names, str) else names if isinstance(names, list) else []:
            self.pictures += 1
            if not isinstance(name, str) or not self._folders.has(name):
                self._missing["/".join(str(name).split("/")[:-1][:2]) or "."] += 1


def _too_few(entry: DataSet, rows: int) -> list[str]:
    if entry.rows is not None and rows != entry.rows:
        return [f"rows: {rows:,} instead of {entry.rows:,}: another version, or cut short"]
    if entry.rows_about is not None and rows < _ROUNDED * entry.rows_about:
        return [f"rows: {rows:,} instead of about {entry.rows_about:,}: another version, or cut short"]
    return []


def _expected(entry: DataSet) -> str:
    if entry.rows is not None:
        return f"{entry.rows:,}"
    return "unknown" if entry.rows_about is None else f"about {entry.rows_about:,}"
