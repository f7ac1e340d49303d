"""Writing that never leaves a half-written file or folder behind under its final name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself."""
    for root, _, files in os.walk(folder):
        for name in files:
            fsync_path(Path(root) / name)
        fsync_path(Path(root))


def write_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically: aside, fsync, rename, fsync of the folder."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder aside; on success flush it and rename it to `target`, on failure remove it.

    `target` must not exist. A kill leaves only the folder aside (`.NAME.PID.tmp`), which `remove_leftovers` clears.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        fsync_tree(aside)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_path(target.parent)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed writers of `folder/name` left aside, except those whose process still runs."""
    for aside in folder.glob(f".{name}.*.tmp"):
        process = aside.name.split(".")[-2]
        if process.isdigit() and int(process) != os.getpid() and Path(f"/proc/{process}").exists():
            continue
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
