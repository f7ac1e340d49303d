"""What to do with the unit of work in hand, such as a shard, when SIGTERM leaves a command some seconds to end."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack

from llavamod_offline.errors import ConfigError
from llavamod_offline.signals import Note, Stopped, finishing, received

_FIRST_WRITE_SECONDS = 1.0  # assumed for a unit, until one has been written


class Grace:
    """On SIGTERM, finishes the unit in hand if the measured rate says that it takes at most `seconds`.

    A context manager. The unit is given up at once if it does not fit, or later if it takes longer than `seconds` after
    all: `Stopped`. With 0 seconds SIGTERM ends the command as it would without this; SIGINT and SIGHUP always do.
    Errors: `ConfigError` if `seconds` is negative or not a number.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        if not 0.0 <= seconds < math.inf:
            raise ConfigError(f"--grace is {seconds:g}: must be a number of seconds, 0 or more")
        self._seconds = seconds
        self._stack = ExitStack()
        self._note: Note | None = None
        self._unit = ""
        self._left = self._done = 0
        self._began = self._spent = 0.0
        self._write_seconds = _FIRST_WRITE_SECONDS
        self._deadline = math.inf

    def __enter__(self) -> Grace:
        if self._seconds:
            self._note = self._stack.enter_context(finishing(self._answer))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def noted(self) -> bool:
        """Whether a signal has come and the unit in hand is being finished."""
        return self._note is not None and self._note.is_set()

    def begin(self, unit: str, pieces: int) -> None:
        """Begin a unit of this many pieces, named as in "shard 'a'"."""
        self._left, self._began, self._unit = pieces, time.monotonic(), unit

    def advance(self, pieces: int) -> None:
        """Count pieces that are done. Errors: `Stopped` if the time is up."""
        self._left -= pieces
        self._done += pieces
        if self.noted and time.monotonic() > self._deadline:
            raise Stopped(received())

    def end(self) -> None:
        """End the unit, before it is written or afterwards."""
        self._spent += time.monotonic() - self._began
        if not self.noted:
            self._unit = ""

    def wrote(self, seconds: float) -> None:
        """Report how long writing a unit took, which happens after `end`."""
        self._write_seconds = seconds

    def check(self) -> None:
        """Between units: end the command if a signal was noted. Errors: `Stopped`, naming what was finished."""
        if self.noted:
            raise Stopped(received(), finished=self._unit)

    def _answer(self) -> str:
        if not self._unit:
            return ""
        spent = self._spent + time.monotonic() - self._began
        needed = self._left * spent / self._done if self._done else math.inf
        needed += self._write_seconds
        if needed > self._seconds:
            return ""
        self._deadline = time.monotonic() + self._seconds
        return f"finishing {self._unit}, in about {needed:.0f} s"
