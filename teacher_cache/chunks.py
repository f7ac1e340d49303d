"""Slices of the shards' columns, put together from decoded chunks of which the latest used are kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.codec import COLUMN_AXES, Codec
from teacher_cache.columns import CHUNK_LENGTHS, ColumnFile
from teacher_cache.manifest import COLUMNS_NAME

_OPEN_SHARDS = 64


class ChunkReader:
    """Reads slices of columns by shard number; shards are opened when first read.

    Safe in threads and after a fork: a forked process starts with nothing open and nothing kept. At most
    `memory_bytes` of decoded chunks are kept. Errors: `CacheError` naming a file that is missing, short or damaged.
    """

    def __init__(self, folders: Sequence[Path], manifests: Sequence[Mapping[str, Any]], memory_bytes: int) -> None:
        self._folders = folders
        self._manifests = manifests
        self._memory_bytes = memory_bytes
        self._start()

    def codec(self, shard: int) -> Codec:
        """How a shard is encoded."""
        return self._file(shard).codec

    def slice(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read elements `start` … `stop` of one column, encoded as they are stored."""
        if stop <= start:
            return self.empty(shard, name)
        length = CHUNK_LENGTHS[COLUMN_AXES[name]]
        parts = [
            self._chunk(shard, name, number)[max(start - number * length, 0) : stop - number * length]
            for number in range(start // length, -(-stop // length))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def empty(self, shard: int, name: str) -> NDArray[Any]:
        """No elements of a column, in its type and width."""
        codec = self.codec(shard)
        width = (len(codec.temperatures),) if name == "log_normalisers" else ()
        return np.zeros((0, *width), codec.dtypes()[name])

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[int, ColumnFile] = OrderedDict()
        self._chunks: OrderedDict[tuple[int, str, int], NDArray[Any]] = OrderedDict()
        self._bytes = 0

    def _chunk(self, shard: int, name: str, number: int) -> NDArray[Any]:
        file = self._file(shard)
        place = (shard, name, number)
        with self._lock:
            if place in self._chunks:
                self._chunks.move_to_end(place)
                return self._chunks[place]
        axis = COLUMN_AXES[name]
        length = CHUNK_LENGTHS[axis]
        chunk = file.read(name, number * length, min((number + 1) * length, file.length(axis)))
        with self._lock:
            if place not in self._chunks:
                self._chunks[place] = chunk
                self._bytes += chunk.nbytes
            while self._bytes > self._memory_bytes and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return chunk

    def _file(self, shard: int) -> ColumnFile:
        if self._process != os.getpid():
            self._start()
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = self._open(shard)
                if len(self._files) > _OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return file

    def _open(self, shard: int) -> ColumnFile:
        folder = self._folders[shard]
        # Zarr takes a missing chunk file for zeros, so presence and size are checked here.
        for name, entry in self._manifests[shard]["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CacheError(f"{file}: missing, or not {entry['bytes']} bytes long: run `cache-teacher verify`")
        return ColumnFile(folder / COLUMNS_NAME)
