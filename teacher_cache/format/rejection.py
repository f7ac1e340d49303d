"""Sequences without a record."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """A sequence that could not be captured, and why."""

    key: str
    role: str
    reason: str
