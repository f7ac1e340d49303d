"""Progress of long work: a live bar on a terminal; in a log, at most one line every 30 seconds.

LLAVAMOD_PROGRESS_SECONDS sets another interval.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from llavamod_offline.errors import ConfigError

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_VARIABLE = "LLAVAMOD_PROGRESS_SECONDS"
_SECONDS = 30.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {units} ({percentage:.0f} %), {rate_fmt}{postfix}, {remaining} left"


class ProgressBar:
    """Shows how much of `total` is done, how fast, and the time left; a context manager.

    `done`: by earlier runs, not counted for the speed. `also`: a second unit, for which only the speed is shown.
    `scale` shortens numbers, as for bytes. `silent` shows nothing.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        also: str = "",
        scale: bool = False,
        silent: bool = False,
    ) -> None:
        self._interval = _interval()
        self._silent, self._also = silent, also
        self._first = self._done = done
        self._units = 0
        self._started = self._shown = time.monotonic()
        self._what, self._total, self._unit, self._scale = what, total, unit, scale
        plural = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
        self._line = _LINE.replace("{units}", unit if scale or total == 1 else plural)
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            unit_scale=scale,
            dynamic_ncols=True,
            disable=silent or not sys.stderr.isatty(),
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, units: int = 0, note: str = "") -> None:
        """Count what is done now, and units of the second kind; negative counts take some back. `note` is shown too."""
        self._done += count
        self._units += units
        now = time.monotonic()
        if self._bar.disable and (self._silent or now - self._shown < self._interval):
            return
        seconds = max(now - self._started, 1e-9)
        notes = [f"{self._units / seconds:,.0f} {self._also}/s"] if self._also else []
        notes += [note] if note else []
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(notes), refresh=False)
            self._bar.update(count)
            return
        self._shown = now
        line = tqdm.format_meter(
            self._done,
            self._total,
            seconds,
            initial=self._first,
            prefix=self._what,
            unit=self._unit,
            unit_scale=self._scale,
            postfix=", ".join(notes),
            bar_format=self._line,
        )
        _LOG.info("%s", line)

    def write(self, text: str) -> None:
        """Print a line to stderr above a live bar."""
        self._bar.write(text, file=sys.stderr)


def track(items: Sequence[_T], what: str, unit: str) -> Iterator[_T]:
    """Yield items and show how many are done."""
    with ProgressBar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.advance()


def _interval() -> float:
    given = os.environ.get(_VARIABLE)
    try:
        return _SECONDS if given is None else float(given)
    except ValueError as error:
        raise ConfigError(f"environment: {_VARIABLE} is '{given}': set a number of seconds") from error
