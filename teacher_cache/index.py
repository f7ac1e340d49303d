"""Looking sequences up by (key, role): all hashes of a cache sorted once, keys compared where hashes are equal.

Hashes are made when a cache is opened and live in memory alone. No Python object per sequence is kept.

Letters: Q sequences of a cache (of a shard, where one is at hand), B of them looked up at once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teacher_cache.sequences import SequenceRows

_WORD = 8
_MIX = 0xBF58476D1CE4E5B9
_SHIFT = 32


class SequenceIndex:
    """Where the sequence of each (key, role) lies: rows count through all shards, in their order."""

    def __init__(self, shards: Sequence[SequenceRows]) -> None:
        self.shards = shards
        self.first_rows = np.cumsum([0, *(len(rows) for rows in shards)])
        hashes_Q = np.empty(self.first_rows[-1], np.uint64)
        positions_Q = np.zeros(len(hashes_Q) + 1, np.int64)
        for rows, start, stop in zip(shards, self.first_rows, self.first_rows[1:], strict=False):
            salts = np.array([role_salt(name) for name in rows.role_names], np.uint64)
            hashes_Q[start:stop] = key_hashes(rows.key_bytes, rows.key_ends, salts[rows.role_codes_Q])
            positions_Q[start + 1 : stop + 1] = rows.n_position_Q
        # Where a sequence's positions begin, counted through all shards.
        self.starts_Q = np.cumsum(positions_Q, out=positions_Q)
        order_Q = np.argsort(hashes_Q)
        self._order_Q = order_Q.astype(np.int32 if len(order_Q) < 2**31 else np.int64)
        self._hashes_Q = hashes_Q[order_Q]

    def __len__(self) -> int:
        return len(self._hashes_Q)

    def find(self, items: Sequence[tuple[str, str]]) -> NDArray[np.int64]:
        """The row of each (key, role), −1 where there is none."""
        keys = [key.encode() for key, _ in items]
        ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        salts_B = np.array([role_salt(role) for _, role in items], np.uint64)
        hashes_B = key_hashes(np.frombuffer(b"".join(keys), np.uint8), ends, salts_B)
        places_B = np.searchsorted(self._hashes_Q, hashes_B)
        rows_B = self._order_Q.take(places_B, mode="clip").astype(np.int64) if len(self) else np.full(len(items), -1)
        shards_B, locals_B = self.places(rows_B)
        candidates = zip(shards_B.tolist(), locals_B.tolist(), keys, items, strict=True)
        for number, (shard, local, key, (_, role)) in enumerate(candidates):
            if not len(self) or not self.shards[shard].is_at(local, key, role):
                rows_B[number] = self._search(int(places_B[number]), hashes_B[number], key, role)
        return rows_B

    def find_one(self, key: str, role: str) -> int:
        """The row of one (key, role), −1 if there is none."""
        content = key.encode()
        wanted = np.uint64(key_hash(content, role_salt(role)))
        return self._search(int(self._hashes_Q.searchsorted(wanted)), wanted, content, role)

    def places(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of rows, and the rows in these shards' tables."""
        shards_B = np.searchsorted(self.first_rows, rows_B, side="right") - 1
        return shards_B, rows_B - self.first_rows[shards_B]

    def repeated(self) -> list[int]:
        """The rows whose (key, role) an earlier row has too."""
        found = []
        for place in (np.flatnonzero(self._hashes_Q[1:] == self._hashes_Q[:-1]) + 1).tolist():
            first = int(np.searchsorted(self._hashes_Q, self._hashes_Q[place]))
            rows = sorted(self._order_Q[first : place + 1].tolist())
            names = [self._name(row) for row in rows]
            found += [row for number, row in enumerate(rows) if names[number] in names[:number]]
        return sorted(set(found))

    def _name(self, row: int) -> tuple[str, str]:
        shard, local = self.place(row)
        entry = self.shards[shard].sequence(local)
        return entry.key, entry.role

    def _search(self, place: int, wanted: np.uint64, key: bytes, role: str) -> int:
        """Look at every row of one hash: different keys may have it."""
        while place < len(self) and self._hashes_Q[place] == wanted:
            row = int(self._order_Q[place])
            shard, local = self.place(row)
            if self.shards[shard].is_at(local, key, role):
                return row
            place += 1
        return -1

    def place(self, row: int) -> tuple[int, int]:
        """The shard of a row, and the row in that shard's table."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return shard, row - int(self.first_rows[shard])


@functools.cache
def role_salt(role: str) -> int:
    """What the hashes of a role begin with."""
    return int.from_bytes(hashlib.blake2b(role.encode(), digest_size=_WORD).digest(), "little")


def key_hash(key: bytes, salt: int) -> int:
    """The hash of one key, as `key_hashes` defines it."""
    hashed = salt ^ len(key)
    for at in range(0, len(key), _WORD):
        hashed = (hashed ^ int.from_bytes(key[at : at + _WORD], "little")) * _MIX % 2**64
        hashed ^= hashed >> _SHIFT
    return hashed


def key_hashes(
    key_bytes: NDArray[np.uint8], ends_Q: NDArray[np.integer], salts_Q: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """64-bit hashes of keys that lie one after another in `key_bytes`, key q from `ends_Q[q]` to `ends_Q[q + 1]`.

    Each begins with its salt and length; then every 8 bytes of the key (little-endian, zeros after its end) are added
    by xor and mixed in: h ← h · BF58476D1CE4E5B9₁₆, h ← h ⊕ (h ≫ 32), modulo 2⁶⁴.
    """
    starts_Q, lengths_Q = ends_Q[:-1].astype(np.int64), np.diff(ends_Q).astype(np.int64)
    hashes_Q = salts_Q ^ lengths_Q.astype(np.uint64)
    padded = np.concatenate([key_bytes, np.zeros(_WORD, np.uint8)])
    words = np.ndarray((len(padded) - _WORD + 1,), "<u8", padded, strides=(1,))  # one begins at every byte
    rows = np.arange(len(hashes_Q))
    for at in range(0, int(lengths_Q.max(initial=0)), _WORD):
        rows = rows[lengths_Q[rows] > at]
        surplus = np.maximum(at + _WORD - lengths_Q[rows], 0).astype(np.uint64) * np.uint64(8)
        word = words[starts_Q[rows] + at] << surplus >> surplus
        mixed = (hashes_Q[rows] ^ word) * np.uint64(_MIX)
        hashes_Q[rows] = mixed ^ (mixed >> np.uint64(_SHIFT))
    return hashes_Q
