"""Sample keys from the ids of a data set, one to one.

A key contains only letters, digits, '-' and '_', so that it can name a tar's members and a cache's rows. Every other
character of an id becomes `_xHH` for each of its UTF-8 bytes; a '_' before an 'x' becomes `_x5F`, so that no two ids
share a key: `coco/a.jpg` → `coco_x2Fa_x2Ejpg`, `a_1` → `a_1`, `a_x` → `a_x5Fx`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_ESCAPED = re.compile(r"[^A-Za-z0-9_\-]|_(?=x)")


def key_from_id(identity: str | int) -> str:
    """Convert an id to a key; different ids give different keys (a number counts as its digits)."""
    return _ESCAPED.sub(lambda match: _escape(match.group()), str(identity))


def stored_key(given: str, has: Callable[[str], bool]) -> str:
    """The stored form of a key that is given as stored or as the data set's id; the given key if neither exists."""
    converted = key_from_id(given)
    return converted if not has(given) and has(converted) else given


def row_key(stem: str, row: int) -> str:
    """The key of a row without an id, or whose id is not used: file stem and row number from 0."""
    return f"{key_from_id(stem)}-{row:09d}"


def _escape(character: str) -> str:
    return "".join(f"_x{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
