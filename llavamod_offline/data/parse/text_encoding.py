"""Bytes of text files → text: UTF-8, or UTF-16 and UTF-32 as Windows programs mark them."""

from __future__ import annotations

import codecs
import json

from llavamod_offline.data.rows import RowError

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def json_encoding(start: bytes) -> str:
    """The encoding of a JSON file, from its first four bytes: by its byte order mark, or by where zeros are."""
    encoding: str = json.detect_encoding(start)  # as `json.loads` does
    return "utf-8-sig" if encoding == "utf-8" else encoding


def decode_text(content: bytes, name: str) -> str:
    """Decode a text file without its byte order mark. Errors: `RowError` naming the file, with the remedy."""
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in content:
        reason = "holds NUL bytes: if it is UTF-16, convert it with `iconv -f UTF-16LE -t UTF-8`, else repair it"
        raise RowError("malformed row", f"file '{name}': {reason}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise RowError("malformed row", f"file '{name}': {not_decodable(error)}") from error


def not_decodable(error: UnicodeDecodeError) -> str:
    """Say which byte is wrong, and how to convert the file."""
    encoding = error.encoding.upper()
    place = f"byte 0x{error.object[error.start]:02X} at position {error.start}"
    hint = (
        ": if it is Latin-1, convert it with `iconv -f LATIN1 -t UTF-8`" if encoding == "UTF-8" else ": save it again"
    )
    return f"not {encoding} ({place}){hint}"
