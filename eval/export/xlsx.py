"""Spreadsheets of one sheet: writing numbers and plain strings, never formulas, and reading any as text.

Reading needs only the standard library. It takes the first sheet's cells; their strings are in a file of their own.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

from llavamod_offline.errors import EvalError

_CREATED = datetime(1980, 1, 1)
_TOO_LONG = -2
_SHEET, _STRINGS = "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml"
_TAG = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_MAX_BYTES = 2**30  # of a sheet: one without images takes a few megabytes


def spreadsheet(rows: Sequence[Sequence[str | int | None]]) -> bytes:
    """An .xlsx file of `rows`; None is an empty cell.

    Text is stored as inline strings, which a spreadsheet program never evaluates, even if they begin with "=".
    Errors: `EvalError` for a text longer than a cell holds.
    """
    import xlsxwriter

    buffer = io.BytesIO()
    with xlsxwriter.Workbook(buffer, {"constant_memory": True}) as book:
        book.set_properties({"created": _CREATED})
        sheet = book.add_worksheet()
        for row, values in enumerate(rows):
            for column, value in enumerate(values):
                if isinstance(value, int):
                    sheet.write_number(row, column, value)
                elif value is not None and sheet.write_string(row, column, value) == _TOO_LONG:
                    problem = f"a text of {len(value)} characters, but an .xlsx cell holds at most 32,767"
                    raise EvalError(f"upload, row {row + 1}: {problem}: generate again with a lower max_new_tokens")
    return buffer.getvalue()


def read_spreadsheet(path: Path) -> list[list[str]]:
    """The rows of the first sheet as text; a missing cell is empty. Errors: `EvalError` if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            strings = [_text(item) for item in _elements(archive, _STRINGS, "si")]
            return [_cells(row, strings) for row in _elements(archive, _SHEET, "row")]
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError, LookupError, ValueError) as error:
        raise EvalError(f"{path}: not readable as a spreadsheet: {error}: save it as .tsv") from error


def _elements(archive: zipfile.ZipFile, name: str, tag: str) -> Iterator[ElementTree.Element]:
    if name == _STRINGS and name not in archive.namelist():  # all strings are in their cells
        return
    if archive.getinfo(name).file_size > _MAX_BYTES:
        raise ValueError(f"{name} is larger than {_MAX_BYTES} bytes")
    yield from ElementTree.fromstring(archive.read(name)).iter(f"{_TAG}{tag}")


def _cells(row: ElementTree.Element, strings: Sequence[str]) -> list[str]:
    found: dict[int, str] = {}
    for cell in row.iter(f"{_TAG}c"):
        kind, value = cell.get("t", "n"), cell.findtext(f"{_TAG}v", "")
        if kind == "s":
            value = strings[int(value)]
        elif kind == "inlineStr":
            value = _text(cell)
        elif kind == "n" and value:
            value = f"{float(value):.15g}"  # a whole number may be stored as 3.0
        found[_column(cell.get("r", ""), len(found))] = value
    return [found.get(number, "") for number in range(max(found, default=-1) + 1)]


def _column(reference: str, default: int) -> int:
    """The number, from 0, of the column that "AB12" names."""
    letters = re.match("[A-Z]+", reference)
    number = 0
    for letter in letters[0] if letters else "":
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1 if letters else default


def _text(element: ElementTree.Element) -> str:
    return "".join(part.text or "" for part in element.iter(f"{_TAG}t"))
