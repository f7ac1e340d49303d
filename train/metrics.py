"""The output of a run in progress: `metrics.jsonl`, and a progress line on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from llavamod_offline.storage import atomic

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 10.0


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


class ProgressLine:
    """Shows loss, tokens/s and time left: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, title: str, steps: int, done: int, *, silent: bool = False) -> None:
        self._title, self._steps, self._done, self._first = title, steps, done, done
        self._silent = silent
        self._start = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty() and not silent
        self._bar = tqdm(total=steps, initial=done, desc=title, unit="step", disable=not terminal, dynamic_ncols=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Report that `step` optimiser steps are done."""
        self._done = step
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps
        if self._silent or not self._bar.disable or not due:
            return
        self._last_line = now
        left = (self._steps - step) * (now - self._start) / max(1, step - self._first)
        logger.info(
            "%s: step %d of %d, loss %.4f, %s tokens/s, %s left",
            *(self._title, step, self._steps, loss, f"{tokens_per_s:,.0f}", tqdm.format_interval(left)),
        )


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity if the line was truncated by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
