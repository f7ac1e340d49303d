"""Run a console script: errors as one line with exit status 2, signals as one line, and plain logging.

The README lists the exit statuses.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from typing import NoReturn, TextIO, cast

import typer
from typer.main import get_command

from llavamod_offline import __version__, signals
from llavamod_offline.errors import LlavaModError
from llavamod_offline.file_errors import describe_file_error
from llavamod_offline.streams import Output, flush_streams, prepare_streams

INPUT_ERROR_STATUS = 2
_BROKEN_PIPE_STATUS = 141  # as if SIGPIPE had ended the process
_NOT_PRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # names in files may contain control characters


def run_command(app: typer.Typer, argv: Sequence[str] | None = None, *, name: str | None = None) -> NoReturn:
    """Run `app` on `argv` (default: the process's arguments) and exit with its status; `name` appears in its help.

    A `LlavaModError`, or an error for a file that cannot be written or read, prints one line and exits with 2;
    LLAVAMOD_DEBUG=1 shows its traceback. A signal that stops the command exits with `Stopped.status`.
    """
    prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    output = Output(sys.stdout)
    try:
        with signals.interruptible(), redirect_stdout(cast("TextIO", output)):
            status = _run(app, arguments, name)
            with suppress(OSError):
                output.flush()
    except signals.Stopped as stop:
        status = stop.status
        _print_error(signals.describe(stop))
    except Exception as error:
        line = f"error: {error}" if isinstance(error, LlavaModError) else describe_file_error(error, arguments)
        if os.environ.get("LLAVAMOD_DEBUG") or not (line or error is output.error):
            raise
        status = INPUT_ERROR_STATUS
        if error is not output.error:
            _print_error(str(line))
    signals.ended(status)
    failure = flush_streams() or output.error
    if isinstance(failure, BrokenPipeError):
        status = _BROKEN_PIPE_STATUS
    elif failure is not None:
        status = INPUT_ERROR_STATUS
        _print_error(f"error: standard output cannot be written: {failure.strerror}: free space or write elsewhere")
    signals.ended(status)
    gc.freeze()  # otherwise Python searches everything imported for cycles at exit, which takes more than a second
    sys.exit(status)


def _run(app: typer.Typer, arguments: list[str], name: str | None) -> int:
    """Run a command and return its status."""
    if arguments == ["--version"]:  # not a Typer option, because that would turn a single command into a group
        print(f"llavamod-offline {__version__}")
        return 0
    command = get_command(app)
    command.epilog = "\n\n".join(filter(None, (command.epilog, "--version prints the version.")))
    try:
        command(args=arguments, prog_name=name, standalone_mode=True)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    return 0


def _print_error(line: str) -> None:
    """Print one line to stderr, unless stderr cannot be written."""
    with suppress(OSError):
        print(_NOT_PRINTED.sub(lambda found: repr(found.group())[1:-1], line), file=sys.stderr)
