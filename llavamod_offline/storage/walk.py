"""Walk the files below a folder, following symbolic links to folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def walk_files(folder: Path, skip: Callable[[str], bool] = lambda name: False) -> Iterator[str]:
    """Yield the files below a folder by their relative names with `/`, in the order of the names of each folder.

    Links to folders are followed wherever they lead, except one that leads back to a folder on its own path: the log
    names it. A broken link is yielded as a file; a folder that is removed meanwhile has no files. `skip`: which files
    and folders to leave out, by name. Errors: `OSError` if a folder cannot be read.
    """
    yield from _walk(folder, "", skip, (_identity(folder),))


def is_utf8(name: str) -> bool:
    """Whether a path can be written down: names from old archives may hold other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def absence(path: Path) -> str:
    """Say why nothing is at `path`: a link is broken, or there is no such file."""
    return f"a link to '{os.readlink(path)}', which does not exist" if path.is_symlink() else "no such file"


def no_folder(path: Path) -> str:
    """Say why `path` is not a folder: it is a file, a broken link, or nothing is there."""
    if path.exists():
        return "a file, not a folder"
    return absence(path) if path.is_symlink() else "no such folder"


def _walk(folder: Path, prefix: str, skip: Callable[[str], bool], above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not skip(entry.name)), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir():
            yield prefix + entry.name
            continue
        try:
            identity = _identity(Path(entry.path))
            if identity in above:
                logger.warning("folder '%s': a link to a folder that contains it: not followed", entry.path)
            else:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", skip, (*above, identity))
        except FileNotFoundError:
            continue


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
