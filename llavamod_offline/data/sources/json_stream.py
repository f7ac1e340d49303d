"""Read JSON arrays and JSON lines row by row, holding one row and a piece of the file in memory.

`advance` is called with the number of bytes read, for a progress bar. Not ijson, which does not bound a row's memory
or locate errors, and rejects what `json` reads: a BOM, Infinity, and integers beyond 64 bits beside floats.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from llavamod_offline.data.parse.text_encoding import json_encoding, not_decodable
from llavamod_offline.data.rows import RowError
from llavamod_offline.errors import DataError
from llavamod_offline.storage.remote_file import Place, open_place

Advance = Callable[[int], object]

MAX_ROW = 64 * 2**20  # characters (array) or bytes (lines) that one row may have
_CHUNK = 2**20
_SPACE = " \t\n\r"


def stream_array(path: Place, advance: Advance) -> Iterator[Any]:
    """Yield the elements of the JSON array in a file.

    Errors: `DataError` naming file, row and character if it is not an array or not valid JSON throughout: rows after a
    fault cannot be delimited.
    """
    with open_place(path) as stream:
        encoding = json_encoding(stream.read(4))
        stream.seek(0)
        text = _Text(path, stream.read, advance, encoding)
        opening = text.take()
        if opening != "[":
            hint = ": name a file of one object per line .jsonl" if opening == "{" else ""
            found = f"found {opening!r}{hint}" if opening else "but the file is empty"
            raise DataError(f"{path}: expected a JSON list of rows, {found}")
        if text.peek() == "]":
            text.take()
        else:
            separator = ","
            while separator == ",":
                yield text.value()
                separator = text.take()
            if separator != "]":
                raise text.error("expected ',' or ']'" if separator else "the file ends inside the list")
        if text.peek():
            raise text.error("unexpected text after the list")


def stream_lines(path: Place, advance: Advance) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 0, value) of a file of one JSON value per line; blank lines are skipped.

    An invalid line is yielded as a `RowError`; one longer than `MAX_ROW` is a `DataError`.
    """
    with open_place(path) as stream:
        encoding = json_encoding(stream.read(4))
        stream.seek(0)
        told = 0
        for number, line in enumerate(_lines(path, stream, encoding)):
            if len(line) > MAX_ROW:
                raise DataError(f"{path}: row {number} has more than {MAX_ROW} bytes")
            advance(stream.tell() - told)
            told = stream.tell()
            if line.strip():
                yield number, _parse_line(line)


def _lines(path: Place, stream: IO[bytes], encoding: str) -> Iterator[bytes | str]:
    """Read lines, as bytes if the file is UTF-8, so that one line that is not does not stop the rest."""
    if encoding.startswith("utf-8"):
        while line := stream.readline(MAX_ROW + 1):
            yield line
        return
    text = io.TextIOWrapper(stream, encoding, newline="\n")
    try:
        while decoded := text.readline(MAX_ROW + 1):
            yield decoded
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {not_decodable(error)}") from error
    finally:
        text.detach()


def _parse_line(line: bytes | str) -> Any:
    try:
        text = line.decode() if isinstance(line, bytes) else line
        return json.loads(text.removeprefix("\ufeff"))  # also where files with such marks were concatenated
    except UnicodeDecodeError as error:
        return RowError("malformed row", f"not valid JSON: {not_decodable(error)}")
    except (ValueError, RecursionError) as error:
        return RowError("malformed row", f"not valid JSON: {error}")


class _Text:
    """The text of a file, with a moving position."""

    def __init__(self, path: Place, read: Callable[[int], bytes], advance: Advance, encoding: str) -> None:
        self._path = path
        self._read = read
        self._advance = advance
        self._decode = codecs.getincrementaldecoder(encoding)().decode
        self._scan = json.JSONDecoder().raw_decode
        self._buffer = ""
        self._position = 0
        self._passed = 0  # characters before the buffer
        self._row = 0
        self._ended = False

    def peek(self) -> str:
        """The next character other than a space, or '' at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if character not in _SPACE:
                    return character
                self._position += 1
            if self._ended:
                return ""
            self._fill()

    def take(self) -> str:
        """Like `peek`, but advance past it."""
        character = self.peek()
        self._position += len(character)
        return character

    def value(self) -> Any:
        """Read one JSON value."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._buffer, self._position)
            except (ValueError, RecursionError) as error:
                if self._ended or not isinstance(error, json.JSONDecodeError):
                    raise self.error(getattr(error, "msg", str(error)), getattr(error, "pos", None)) from error
            else:
                # Only what follows a number ends it: '1' may continue as '12' or '1.5' in the next piece.
                closed = isinstance(value, dict | list | str) or self._buffer[end : end + 1] in {",", "]", *_SPACE}
                if closed or self._ended:
                    self._position = end
                    self._row += 1
                    return value
            if len(self._buffer) - self._position > MAX_ROW:
                raise self.error(f"no valid JSON within {MAX_ROW} characters")
            self._fill()

    def error(self, message: str, position: int | None = None) -> DataError:
        """An error that names row and character."""
        place = self._passed + (self._position if position is None else position)
        return DataError(f"{self._path}: row {self._row} (character {place}): {message}")

    def _fill(self) -> None:
        """Read a piece as large as the buffer, which keeps the work linear in the row's length."""
        content = self._read(max(_CHUNK, len(self._buffer) - self._position))
        self._ended = not content
        self._advance(len(content))
        try:
            text = self._decode(content, self._ended)
        except UnicodeDecodeError as error:
            raise self.error(not_decodable(error)) from error
        self._passed += self._position
        self._buffer = self._buffer[self._position :] + text
        self._position = 0
