"""Going through a cache in its own order, so that neighbouring blocks are decoded once."""

from __future__ import annotations

from teacher_cache.reader import TeacherCache


def sequence_items(cache: TeacherCache, step: int = 1) -> list[tuple[str, str]]:
    """(key, role) of every `step`-th sequence, in the order of the cache."""
    found: list[tuple[str, str]] = []
    first = 0
    for table in cache._tables:
        rows = range(first, len(table), step)
        if rows:
            keys, roles = table.column("key"), table.column("role")
            found += [(keys[row].as_py(), roles[row].as_py()) for row in rows]
            first = rows[-1] + step
        first -= len(table)
    return found
