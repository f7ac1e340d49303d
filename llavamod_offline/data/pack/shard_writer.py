"""Write a shard: a WebDataset tar, sample by sample, recording the position of each member's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from llavamod_offline.data.sets.tar_files import Shard

_TAR_BLOCK = 512


class ShardWriter:
    """Writes one tar with WebDataset's writer and returns the position of each member's bytes."""

    def __init__(self, folder: Path, name: str) -> None:
        from webdataset.writer import TarWriter  # takes seconds to import, with torch

        self.name = name
        self.samples = 0
        self._file = (folder / f"{name}.tar").open("wb")
        self._stream = _HashingStream(self._file)
        # PAX: a key may be longer than ustar's 100 characters.
        self._tar = TarWriter(
            self._stream, user="root", group="root", mode=0o444, mtime=0, encoder=False, format="PAX_FORMAT"
        )

    @property
    def size(self) -> int:
        """The bytes of all members so far, headers included."""
        return int(self._tar.tarstream.offset)

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """Write a sample's files and return its `members` for the index."""
        self.samples += 1
        entries = []
        for name, content in members:
            self._tar.write({"__key__": key, name: content})  # one at a time: a dict of several would be sorted by name
            padded = -(-len(content) // _TAR_BLOCK) * _TAR_BLOCK
            entries.append({"name": name, "offset": self.size - padded, "size": len(content)})
        return entries

    def close(self) -> Shard:
        """Finish the tar."""
        self._tar.close()
        self._file.close()
        return Shard(self.name, self.samples, self._stream.size, self._stream.digest.hexdigest())


class _HashingStream:
    """A file that hashes and counts the bytes written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self.stream.write(content)
