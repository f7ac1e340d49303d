"""Run a console script: errors as one line with exit status 2, and plain logging."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from typer.main import get_command

from llavamod_offline import __version__
from llavamod_offline.errors import LlavaModError

INPUT_ERROR_STATUS = 2
_NOT_PRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # names in files may contain control characters


def run_command(app: typer.Typer, argv: Sequence[str] | None = None, *, name: str | None = None) -> NoReturn:
    """Run `app` on `argv` (default: the process's arguments) and exit with its status; `name` appears in its help.

    A `LlavaModError` prints one line and exits with 2; LLAVAMOD_DEBUG=1 shows its traceback. Ctrl-C exits with 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:  # not a Typer option, which would turn a single command into a group
        print(f"llavamod-offline {__version__}")
        sys.exit(0)
    command = get_command(app)
    command.epilog = "\n\n".join(filter(None, (command.epilog, "--version prints the version.")))
    try:
        command(args=arguments, prog_name=name, standalone_mode=True)
    except LlavaModError as error:
        if os.environ.get("LLAVAMOD_DEBUG"):
            raise
        print(f"error: {_NOT_PRINTED.sub(lambda found: repr(found.group())[1:-1], str(error))}", file=sys.stderr)
        sys.exit(INPUT_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
