"""The log of a run in progress: `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llavamod_offline.storage import atomic

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per logged step to `{output}/metrics.jsonl`, and passes it to `also`.

    On opening, drops lines after step `resume_step`, since the run will repeat those steps.
    """

    def __init__(
        self, output: Path, resume_step: int, also: Callable[[dict[str, Any]], None] = lambda entry: None
    ) -> None:
        self._also = also
        file = output / METRICS_NAME
        kept = []
        if resume_step and file.is_file():
            kept = [line for line in file.read_text().splitlines(keepends=True) if _step_of(line) <= resume_step]
        atomic.write_file(file, "".join(kept))
        self._stream: IO[str] = file.open("a")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry and flush it to the file."""
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()
        self._also(entry)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity if the line was truncated by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
