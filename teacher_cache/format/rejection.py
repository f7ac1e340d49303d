"""Sequences without a record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """A sequence that could not be captured, and why; `file` and `row`: where its sample was packed from, if known."""

    key: str
    role: str
    reason: str
    file: str | None = None
    row: int | None = None
