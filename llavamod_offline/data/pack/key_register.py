"""Every key of a new set, to detect repeated ones, in 28 bytes of memory per sample."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import DataError

_FRESH = 2**16  # keys in a hash table; older ones are in sorted arrays, each at least twice as long as the next


class KeyRegister:
    """Keys as 64 bits of their BLAKE2b; the chance of a collision among ten million keys is one in 300,000.

    `hint`: what to do about a repeated key. `files`: the ordinal of each file so far.
    """

    def __init__(self, hint: str) -> None:
        self._hint = hint
        self.files: dict[str, int] = {}
        self._hashes, self._files, self._rows = array("Q"), array("I"), array("Q")
        self._fresh: set[int] = set()
        self._sorted: list[NDArray[np.uint64]] = []

    def claim(self, key: str, file: str, row: int) -> int:
        """Reserve a key for the row of a file; return the file's ordinal. Errors: `DataError` if it is taken."""
        found = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        if found in self._fresh or any(_holds(hashes, found) for hashes in self._sorted):
            place = self._hashes.index(found)
            earlier = f"{list(self.files)[self._files[place]]} row {self._rows[place]}"
            raise DataError(f"duplicate key '{key}': {earlier} and {file} row {row}: {self._hint}")
        self._hashes.append(found)
        ordinal = self.files.setdefault(file, len(self.files))
        self._files.append(ordinal)
        self._rows.append(row)
        self._fresh.add(found)
        if len(self._fresh) == _FRESH:
            self._sort()
        return ordinal

    def _sort(self) -> None:
        self._sorted.append(np.sort(np.fromiter(self._fresh, np.uint64, len(self._fresh))))
        self._fresh.clear()
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            merged = np.concatenate([self._sorted.pop(), self._sorted.pop()])
            merged.sort(kind="stable")  # linear for sorted parts
            self._sorted.append(merged)


def _holds(hashes: NDArray[np.uint64], wanted: int) -> bool:
    place = int(hashes.searchsorted(np.uint64(wanted)))
    return place < len(hashes) and int(hashes[place]) == wanted
