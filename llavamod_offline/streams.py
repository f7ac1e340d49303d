"""The standard streams of a command: closed, full, or with an encoding that lacks some characters."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

_T = TypeVar("_T")
_ESCAPES = "llavamod-escapes"


class Output:
    """Standard output that remembers its error, which reads like any other stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write to the stream."""
        return self._remembered(lambda: self._stream.write(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._remembered(self._stream.flush)

    def _remembered(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Log to stderr, and let no closed stream, missing character or full disk behind stderr end a command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    codecs.register_error(_ESCAPES, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)
    handler = logging.StreamHandler(sys.stderr)
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def flush_streams() -> OSError | None:
    """Flush stdout and stderr; an error of stdout is returned.

    Drops what a stream cannot write, so that Python does not fail again when it exits.
    """
    failure = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            failure = failure or (error if stream is sys.stdout else None)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failure


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Write what an encoding lacks as JSON does, so that printed JSON stays valid."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
