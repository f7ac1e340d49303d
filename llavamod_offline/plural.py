"""Numbers of things in messages, in the singular or the plural."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """A number with its noun: `1 row`, `2,000 rows`. `things`: the plural, if it is not the noun plus s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
