"""Captures, and stand-ins for them, in processes of their own that are killed with SIGKILL at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.teacher_cache.capture.driver import write_cache

MOMENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")


def fork_server() -> ForkServerContext:
    """A server that forks processes with everything already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["teacher_cache.capture.run", "s3fs", "tests.teacher_cache.capture.killer"])
    return context


def kill_before_change(below: str, moment: int) -> list[int]:
    """Send SIGKILL to this process just before the `moment`-th change of a file or folder below `below`.

    An audit hook counts the moments, so that they fall between any two steps of a commit: before a file is opened for
    writing, a folder made, a name linked, renamed or removed. The result holds the count so far.
    """
    seen = [0]

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event not in MOMENTS or not isinstance(details[0], str | os.PathLike):
            return
        inside = os.fspath(details[0]).startswith(below) or Path(os.fspath(details[0])).parent.as_posix() == below
        writing = event != "open" or (isinstance(details[1], str) and set(details[1]) & set("wxa+"))
        if inside and writing:
            seen[0] += 1
            if seen[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def kill_before_upload(moment: int) -> list[int]:
    """Send SIGKILL to this process just before the `moment`-th request that writes to a bucket."""
    import s3fs

    seen = [0]
    send = s3fs.S3FileSystem._call_s3

    async def counted(files: s3fs.S3FileSystem, method: str, *arguments: Any, **settings: Any) -> Any:
        if method in ("put_object", "delete_object", "delete_objects", "create_multipart_upload"):
            seen[0] += 1
            if seen[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return await send(files, method, *arguments, **settings)

    s3fs.S3FileSystem._call_s3 = counted
    return seen


def run_and_die(arguments: list[str], output: str, moment: int, counted: Connection) -> None:
    """Run a capture and die before the `moment`-th change below `output`; if there are fewer, send their number."""
    from llavamod_offline.config import load_config
    from teacher_cache.capture.run import run_capture
    from teacher_cache.config import CacheTeacherConfig

    seen = kill_before_change(output, moment)
    run_capture(load_config(CacheTeacherConfig, (), arguments))
    counted.send(seen[0])


def generate_and_die(arguments: list[str], below: str, moment: int, counted: Connection) -> None:
    """Let a teacher write answers and die before the `moment`-th change; if there are fewer, send their number."""
    from llavamod_offline.config import load_config
    from teacher_cache.config import CacheTeacherConfig
    from teacher_cache.generate.run import generate

    seen = kill_before_change(below, moment)
    generate(load_config(CacheTeacherConfig, (), arguments))
    counted.send(seen[0])


def write_and_die(where: str, moment: int, counted: Connection, variables: Mapping[str, str]) -> None:
    """Write prepared records and die before the `moment`-th change; if there are fewer, send their number.

    `variables` are added to the environment, which is otherwise the fork server's.
    """
    os.environ.update(variables)
    seen = kill_before_upload(moment) if "://" in where else kill_before_change(where, moment)
    write_cache(where)
    counted.send(seen[0])


def repair_and_die(where: str, moment: int, counted: Connection) -> None:
    """Repair a cache and die before the `moment`-th change; if there are fewer, send their number."""
    from teacher_cache.verify.repair import repair_cache

    seen = kill_before_change(where, moment)
    repair_cache(where)
    counted.send(seen[0])


def write_until_killed(where: str, moment: int, variables: Mapping[str, str] | None = None) -> int | None:
    """Run `write_and_die`; return the number of changes if it was not killed."""
    here, there = fork_server().Pipe()
    process = fork_server().Process(target=write_and_die, args=(where, moment, there, variables or {}))
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0
    changes: int = here.recv()
    return changes


def write_and_wait_for_it(where: str, ready: Connection) -> None:
    """Write prepared records, announcing the start, so that it can be killed from outside."""
    ready.send(None)
    write_cache(where)
