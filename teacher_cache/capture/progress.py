"""The progress bar of a capture, and of the answers that a teacher writes."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class ProgressBar:
    """A bar over samples that also shows how many `unit` (positions, tokens) are done a second."""

    def __init__(self, samples: int, what: str, unit: str) -> None:
        self._bar = tqdm(total=samples, unit="sample", desc=what, disable=not sys.stderr.isatty())
        self._unit = unit
        self._done = 0
        self._started = time.perf_counter()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, samples: int, units: int) -> None:
        """Count finished samples and units; less than none, if those of a worker were lost."""
        self._done += units
        rate = self._done / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} {self._unit}/s", refresh=False)
        self._bar.update(int(samples))
