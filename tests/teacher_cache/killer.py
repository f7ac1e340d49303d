"""A capture in a process of its own that is killed, for good, at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

MOMENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def run_and_die(arguments: list[str], output: str, moment: int) -> None:
    """Run a capture; just before the `moment`-th change of a file or folder below `output`, send SIGKILL to ourselves.

    A moment beyond the last lets the run finish. Moments are counted by an audit hook, so that they fall between any
    two steps of a commit: before a file is opened for writing, a folder made, renamed or removed.
    """
    from llavamod_offline.config import load_config
    from teacher_cache.config import CacheConfig
    from teacher_cache.job import run_job

    seen = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in MOMENTS or not isinstance(details[0], str | os.PathLike):
            return
        below = os.fspath(details[0]).startswith(output) or Path(os.fspath(details[0])).parent.as_posix() == output
        writing = event != "open" or (isinstance(details[1], str) and set(details[1]) & set("wxa+"))
        if below and writing:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run_job(load_config(CacheConfig, (), arguments))
