"""Numbers agree with their nouns."""

from __future__ import annotations

from llavamod_offline.plural import counted


def test_counted() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert [counted(number, "entry", "entries") for number in (1, 3)] == ["1 entry", "3 entries"]
