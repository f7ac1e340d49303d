"""Slices of the shards' records, cut from decoded blocks in a least-recently-used cache."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import CacheError
from teacher_cache.format.columns import ColumnFile
from teacher_cache.format.manifest import COLUMNS_NAME
from teacher_cache.format.record import Records

_OPEN_SHARDS = 64
# Of decoded records (`Records`): underestimating by one byte causes endless re-decoding.
_POSITION_BYTES, _TOPK_BYTES, _TAIL_SAMPLE_BYTES, _SHARD_BYTES = 40, 8, 4, 2**14
Columns = tuple[NDArray[Any], ...]


def decoded_bytes(shard: Mapping[str, Any], temperatures: int) -> int:
    """The approximate memory of a shard's decoded records, from its entry in cache.json."""
    return (
        int(shard["positions"]) * (_POSITION_BYTES + 4 * temperatures)
        + int(shard["heads"]) * _TOPK_BYTES
        + int(shard["draws"]) * _TAIL_SAMPLE_BYTES
        + _SHARD_BYTES
    )


class BlockReader:
    """Reads records by shard number and position; shards are opened when first read.

    Safe in threads and after a fork: a forked process starts with no open files and no blocks. Keeps at most
    `memory_bytes` of decoded blocks, but at least one. Decodes normalisers only for `temperatures` (None: all).
    Errors: `CacheError` naming a file that is missing, short or damaged.
    """

    def __init__(
        self,
        folder: Callable[[int], Path],
        manifests: Sequence[Mapping[str, Any]],
        memory_bytes: int,
        temperatures: tuple[float, ...] | None = None,
    ) -> None:
        self._folder = folder
        self._manifests = manifests
        self.memory_bytes = memory_bytes
        self._temperatures = temperatures
        self._start()

    def pieces(self, shard: int, spans: Sequence[tuple[int, int]]) -> list[list[Columns]]:
        """Read ranges of positions `start` … `stop` of a shard: for each, views of the blocks that contain it.

        A piece is a tuple of the fields of `Records`: making a `Records` of each would cost more than reading it.
        """
        file = self.file(shard)
        length = file.block_positions
        blocks: dict[int, _Block] = {}
        found = []
        for start, stop in spans:
            pieces = []
            for number in range(start // length, -(-stop // length)):
                if number not in blocks:
                    blocks[number] = self._block(file, shard, number)
                first = number * length
                pieces.append(blocks[number].cut(max(start - first, 0), min(stop - first, length)))
            found.append(pieces)
        return found

    def file(self, shard: int) -> ColumnFile:
        """The columns of a shard, opened."""
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

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[int, ColumnFile] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._bytes = 0

    def _block(self, file: ColumnFile, shard: int, number: int) -> _Block:
        with self._lock:
            kept = self._blocks.get((shard, number))
            if kept is not None:
                self._blocks.move_to_end((shard, number))
                return kept
        (records,) = file.records(number, number + 1, self._temperatures)
        decoded = _Block(records)
        with self._lock:
            if (shard, number) not in self._blocks:  # another thread may have been faster
                self._blocks[shard, number] = decoded
                self._bytes += decoded.bytes
            while self._bytes > self.memory_bytes and len(self._blocks) > 1:
                self._bytes -= self._blocks.popitem(last=False)[1].bytes
        return decoded

    def _open(self, shard: int) -> ColumnFile:
        folder = self._folder(shard)
        # Zarr reads a missing chunk file as zeros, so check presence and size here.
        for name, entry in self._manifests[shard]["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CacheError(f"{file}: missing, or not {entry['bytes']} bytes long: run `cache-teacher verify`")
        return ColumnFile(folder / COLUMNS_NAME)


class _Block:
    """Decoded records, with the offsets of each position's top-k ids and tail samples."""

    def __init__(self, records: Records) -> None:
        counts = (records.topk_counts_N, records.tail_counts_N)
        self._edges = [np.concatenate([[0], np.cumsum(counts_N, dtype=np.int64)]) for counts_N in counts]
        axes = [field.name[-1] for field in fields(Records)]
        self._columns: list[NDArray[Any]] = [getattr(records, field.name) for field in fields(Records)]
        self._spans = ["NHD".index(axis) if axis in "HD" else 0 for axis in axes]
        self.bytes = sum(array.nbytes for array in (*self._columns, *self._edges))

    def cut(self, start: int, stop: int) -> Columns:
        """The positions `start` … `stop`, as views."""
        spans = [slice(start, stop), *(slice(edges.item(start), edges.item(stop)) for edges in self._edges)]
        return tuple([column[spans[span]] for column, span in zip(self._columns, self._spans, strict=True)])
