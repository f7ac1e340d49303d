"""Shared by the examples: their command lines."""

from __future__ import annotations

import sys
from pathlib import Path


def read_paths(example: str, *names: str) -> list[Path]:
    """The command line's paths, one per name; otherwise one line of usage and exit status 2."""
    given = sys.argv[1:]
    if len(given) != len(names) or any(word.startswith("-") for word in given):
        print(f"usage: python -m {__package__}.{example} {' '.join(names)}", file=sys.stderr)
        sys.exit(2)
    return [Path(word) for word in given]
