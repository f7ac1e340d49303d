"""Reading benchmark files, with errors that name file, line and field."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import EvalError
from llavamod_offline.storage.walk import no_folder

log = logging.getLogger(__name__)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class FileImage:
    """An image file: the first of `names` below `folder` that exists."""

    folder: Path
    names: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The image's path; with the first name if no file exists."""
        places = [self.folder / name for name in self.names]
        return next((place for place in places if place.is_file()), places[0])

    @property
    def name(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether there is a file."""
        return self.path.is_file()

    def read(self) -> bytes:
        """The encoded image. Errors: `EvalError` if the file is missing or unreadable."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise EvalError(f"{self.path}: the image cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class EmbeddedImage:
    """A base64 image in a `column` of the JSON line, or with `columns` of the TSV row, at `offset`."""

    path: Path
    offset: int
    column: str
    columns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file and the place in it, for messages."""
        return f"{self.path}, '{self.column}' of the row at byte {self.offset}"

    @property
    def exists(self) -> bool:
        """Whether the table has the column; True for JSON lines, where only reading can tell."""
        return not self.columns or self.column in self.columns

    def read(self) -> bytes:
        """The encoded image. Errors: `EvalError` if it is not base64."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            if self.columns:
                row = next(_csv_rows((line.decode() for line in stream), self.path))
                value: Any = dict(zip(self.columns, row, strict=False)).get(self.column)
            else:
                value = json.loads(stream.readline()).get(self.column)
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise EvalError(f"{self.name}: not a base64 image: download the file again") from error


@dataclass(slots=True)  # not frozen: creating hundreds of thousands would take three times as long
class Row:
    """One object of a benchmark file; its getters raise `EvalError` naming file, place and field."""

    path: Path
    place: str
    values: dict[str, Any]
    offset: int = 0

    def text(self, name: str) -> str:
        """A string field."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.error(f"field '{name}' must be a string, found {type(value).__name__}")
        return value

    def identifier(self, name: str) -> str:
        """A field that is a string or a whole number, as a string."""
        value = self.values.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"field '{name}' must be a string or a whole number, found {type(value).__name__}")
        return str(value)

    def whole(self, name: str) -> int:
        """A whole number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"field '{name}' must be a whole number, found {type(value).__name__}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        value = self.values.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"field '{name}' must be a list of strings")
        return list(value)

    def error(self, problem: str) -> EvalError:
        """An error about this row."""
        return EvalError(f"{self.path}: {self.place}: {problem}")


def find_file(root: Path, *candidates: str) -> Path:
    """The first of several files below `root` that exists. Errors: `EvalError` naming them."""
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    if not root.is_dir():
        raise EvalError(f"{root}: {no_folder(root)}: set 'root' to the folder with the benchmarks' folders")
    raise EvalError(f"{root}: no {' or '.join(candidates)}: put the benchmark's files there")


def read_json(path: Path) -> Any:
    """Read a JSON file. Errors: `EvalError` naming it."""
    try:
        return _loads(path.read_bytes())
    except OSError as error:
        raise EvalError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path}: not readable as JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise EvalError(f"{path}: expected a JSON object")
    return content


def read_rows(path: Path) -> list[Row]:
    """Read a JSON file that holds a list of objects."""
    content = read_json(path)
    if not isinstance(content, list):
        raise EvalError(f"{path}: expected a JSON list")
    return [as_row(path, f"item {number}", item) for number, item in enumerate(content, 1)]


def as_row(path: Path, place: str, value: Any, offset: int = 0) -> Row:
    """Wrap a JSON object. Errors: `EvalError` for any other value."""
    if not isinstance(value, dict):
        raise EvalError(f"{path}: {place}: expected a JSON object, found {type(value).__name__}")
    return Row(path, place, value, offset)


def read_jsonl(path: Path, *, drop: Sequence[str] = ()) -> list[Row]:
    """Read one JSON object per line, without the fields in `drop` (images, which are read when needed)."""
    rows, offset = [], 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    value = _loads(line, mark=number == 1)
                except (ValueError, RecursionError) as error:
                    raise EvalError(f"{path}: line {number}: not readable as JSON: {error}") from error
                row = as_row(path, f"line {number}", value, offset)
                for name in drop:
                    row.values.pop(name, None)
                rows.append(row)
            offset += len(line)
    return rows


def end_last_line(path: Path) -> None:
    """Make a file of JSON lines end with a whole line, so that more can follow.

    An unterminated last line is ended if it is whole, as after an edit, and removed if a kill or a full disk cut it.
    """
    with path.open("r+b") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        try:
            json.loads(content[whole:])
        except ValueError:
            log.info("%s: removing an incomplete last line", path)
            stream.truncate(whole)
        else:
            stream.write(b"\n")


def read_table(path: Path, *, drop: Sequence[str] = (), delimiter: str = "\t") -> tuple[tuple[str, ...], list[Row]]:
    """Read a table with a header line and quoted fields → column names, rows of strings."""
    with path.open("rb") as stream:
        consumed = [0]
        rows = _csv_rows(_counted(stream, consumed, path), path, delimiter)
        columns = tuple(next(rows, []))
        found: list[Row] = []
        while True:
            offset = consumed[0]
            fields = next(rows, None)
            if fields is None:
                return columns, found
            if not fields:
                continue
            if len(fields) != len(columns):
                raise EvalError(f"{path}: row {len(found) + 1} has {len(fields)} fields for {len(columns)} columns")
            values = {name: text for name, text in zip(columns, fields, strict=True) if name not in drop}
            found.append(Row(path, f"row {len(found) + 1}", values, offset))


def data_checksum(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 (hex) over the names below `root` and the contents of `files`, sorted by name."""
    digest, prefix = hashlib.sha256(), (root / "x").as_posix()[:-1]
    for file in sorted(set(files), key=lambda file: file.parts):  # comparing paths is much slower
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        path = file.as_posix()
        name = path.removeprefix(prefix) if path.startswith(prefix) else file.name
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _loads(encoded: bytes, *, mark: bool = True) -> Any:
    """Parse UTF-8 JSON, perhaps after a byte order mark. Errors: `ValueError`, also for a lone surrogate."""
    value = json.loads(encoded.decode("utf-8-sig" if mark else "utf-8"))
    if _SURROGATE.search(encoded):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _counted(stream: Any, consumed: list[int], path: Path) -> Iterator[str]:
    for line in stream:
        consumed[0] += len(line)
        try:
            yield line.decode("utf-8-sig" if consumed[0] == len(line) else "utf-8")
        except UnicodeDecodeError as error:
            raise EvalError(f"{path}: not UTF-8: save the file as UTF-8") from error


def _csv_rows(lines: Iterator[str], path: Path, delimiter: str = "\t") -> Iterator[list[str]]:
    limit = csv.field_size_limit(sys.maxsize)  # a base64 image exceeds the default limit
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise EvalError(f"{path}: not readable as a table: {error}: save or download the file again") from error
    finally:
        csv.field_size_limit(limit)
