"""Look up images, by the relative paths that data sets use, in one or several folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from llavamod_offline.data.images import MAX_ENCODED_BYTES, image_extension
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources.fitting_folders import advice_on_missing
from llavamod_offline.errors import DataError
from llavamod_offline.storage.walk import absence, no_folder


class ImageFolders:
    """Folders that hold images; `near`: where to look for such folders if there are none.

    Errors: `DataError` if one of them is not a folder.
    """

    def __init__(self, folders: Sequence[Path], near: Path | None = None) -> None:
        self._near = near
        for folder in folders:
            if not folder.is_dir():
                raise DataError(f"image folder '{folder}': {no_folder(folder)}")
        self.folders = tuple(folders)

    def has(self, name: str) -> bool:
        """Whether a path is inside the folders and names a file in one of them."""
        return _is_inside(PurePosixPath(name)) and any(os.path.isfile(folder / name) for folder in self.folders)

    def can_use(self, name: str) -> bool:
        """Whether a path names an image in one of the folders that can be read and decoded."""
        try:
            image_extension(self.read(name), name=name)
        except DataError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Read an image by its relative path.

        Errors: `RowError` if the path leads out of the folders, exists in none or several of them, or the file is too
        large or unreadable. `DataError` if no folders were given.
        """
        if not self.folders:
            advice = advice_on_missing([name], [self._near]) if self._near is not None else ""
            raise DataError(
                f"image '{name}': no image folder: name one with --images DIR" + (f": {advice}" if advice else "")
            )
        path = PurePosixPath(name)
        if not _is_inside(path):
            raise RowError("bad image path", f"image '{name}': must be a path inside an image folder", name)
        found = [folder / path for folder in self.folders if os.path.isfile(folder / path)]
        if not found:
            broken = [folder / path for folder in self.folders if os.path.islink(folder / path)]
            reason = f"{broken[0]} is {absence(broken[0])}" if broken else f"no such file in {_names(self.folders)}"
            raise RowError("missing image", f"image '{name}': {reason}", name)
        if len(found) > 1:
            raise RowError("bad image path", f"image '{name}': in more than one image folder: {_names(found)}", name)
        try:
            size = found[0].stat().st_size
            if size > MAX_ENCODED_BYTES:
                reason = f"image '{name}': {size} bytes, more than {MAX_ENCODED_BYTES}"
                raise RowError("undecodable image", reason, name)
            return found[0].read_bytes()
        except OSError as error:
            raise RowError("missing image", f"image '{name}': cannot be read: {error.strerror}", name) from error


def _is_inside(path: PurePosixPath) -> bool:
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(f"'{path}'" for path in paths)
