"""Find out why images are missing: which other folder holds them, or how their names differ from the files'."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

_LEVELS_UP = 3
_LEVELS_DOWN = 2
_MAX_FOLDERS = 500
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".JPG", ".JPEG", ".PNG")


def advice_on_missing(names: Sequence[str], folders: Sequence[Path]) -> str:
    """Advise on images that are in none of the folders; '' if nothing fits at least half of them."""
    if not names:
        return ""
    if _most(names, [name for name in names if "://" in name]):
        return "these are addresses: download the images, and name the files in the rows"
    if _most(names, [name for name in names if "\\" in name]):
        return "write / for \\ in the rows' image names"
    around = list(dict.fromkeys(_around(folders)))
    fitting = _cover(names, around)
    if fitting:
        return "try " + " ".join(f"--images {folder}" for folder in fitting)
    for folder in (*folders, *around):
        for name in names[:3]:
            parts = PurePosixPath(name).parts
            for cut in range(1, len(parts)):
                prefix = "/".join(parts[:cut]).replace("//", "/") + "/"
                shorter = [other.removeprefix(prefix) for other in names if other.startswith(prefix)]
                if _most(names, _there(folder, shorter)):
                    return f"remove '{prefix}' from the rows' image names, with --images {folder}"
    for suffix in _SUFFIXES:
        if any(
            _most(names, _there(folder, [os.path.splitext(name)[0] + suffix for name in names])) for folder in folders
        ):
            return f"the files' names end in '{suffix}': write so in the rows"
    return ""


def _around(folders: Sequence[Path]) -> Iterator[Path]:
    """The folders below and above others, nearest first."""
    for folder in folders:
        level = [folder]
        for _ in range(_LEVELS_DOWN):
            level = [child for parent in level for child in _children(parent)][:_MAX_FOLDERS]
            yield from level
    for folder in folders:
        for levels in range(1, _LEVELS_UP + 1):
            yield Path(os.path.normpath(folder / Path(*[".."] * levels)))


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return [folder / name for name in sorted(entry.name for entry in found if entry.is_dir())[:_MAX_FOLDERS]]
    except OSError:
        return []


def _cover(names: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """Up to four folders that together hold most of the images; none if they do not."""
    left, chosen = list(names), list[Path]()
    while left and len(chosen) < 4:
        hits = {folder: set(_there(folder, left)) for folder in folders}
        best = max(folders, key=lambda folder: len(hits[folder]), default=None)
        if best is None or not hits[best]:
            break
        chosen.append(best)
        left = [name for name in left if name not in hits[best]]
    return chosen if 2 * len(left) <= len(names) else []


def _there(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("/") and os.path.isfile(folder / name)]


def _most(names: Sequence[str], some: Sequence[str]) -> bool:
    return bool(some) and 2 * len(some) >= len(names)
