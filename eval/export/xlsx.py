"""Writing a spreadsheet of one sheet whose cells are numbers or plain strings, never formulas."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime

from llavamod_offline.errors import EvalError

_CREATED = datetime(1980, 1, 1)
_TOO_LONG = -2


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
