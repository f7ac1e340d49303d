"""Looking sequences up by (key, role): all hashes of a cache sorted once, keys compared where hashes are equal.

Hashes are made when they are first asked for and live in memory alone; what stands in the order of the cache is found
without them. No Python object per sequence is kept.

Shape suffixes: Q sequences of a cache (of a shard, where one is at hand), B of them looked up at once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.format.sequences import SequenceRows, string_buffers

_WORD = 8
_MIX = 0xBF58476D1CE4E5B9
_SHIFT = 32
# Strings one after another: their bytes, where each begins, and where the last one ends.
Texts = tuple[NDArray[np.uint8], NDArray[np.int64]]


class SequenceIndex:
    """Where the sequence of each (key, role) lies: rows count through all shards, in their order."""

    def __init__(self, shards: Sequence[SequenceRows]) -> None:
        self.shards = shards
        self.first_rows = np.cumsum([0, *(len(rows) for rows in shards)])
        # Where a sequence's positions begin, counted through all shards.
        self.starts_Q = np.zeros(len(self) + 1, np.int64)
        if shards:
            np.cumsum(np.concatenate([rows.n_position_Q for rows in shards]), dtype=np.int64, out=self.starts_Q[1:])
        # The lowest bits of a hash make room for the row: numbers are sorted several times as fast as places are.
        self._row_bits = np.uint64((1 << len(self).bit_length()) - 1)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.integer]]:
        """The hashes of all rows, rising, and which row each is of."""
        salts_Q = np.empty(len(self), np.uint64)
        for rows, start, stop in zip(self.shards, self.first_rows, self.first_rows[1:], strict=False):
            salts = np.array([role_salt(name) for name in rows.role_names], np.uint64)
            salts_Q[start:stop] = salts[rows.role_codes_Q]
        hashes_Q = key_hashes(*self._texts(), salts_Q)
        sorted_Q = np.sort(hashes_Q & ~self._row_bits | np.arange(len(hashes_Q), dtype=np.uint64))
        narrow = np.int32 if len(sorted_Q) < 2**31 else np.int64
        order_Q: NDArray[np.integer] = (sorted_Q & self._row_bits).astype(narrow)
        return sorted_Q & ~self._row_bits, order_Q

    @property
    def _hashes_Q(self) -> NDArray[np.uint64]:
        return self._sorted[0]

    @property
    def _order_Q(self) -> NDArray[np.integer]:
        return self._sorted[1]

    def find(self, items: Sequence[tuple[str, str]]) -> NDArray[np.int64]:
        """The row of each (key, role), −1 where there is none."""
        keys = [key.encode() for key, _ in items]
        ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        salts_B = np.array([role_salt(role) for _, role in items], np.uint64)
        hashes_B = key_hashes(np.frombuffer(b"".join(keys), np.uint8), ends, salts_B) & ~self._row_bits
        places_B = np.searchsorted(self._hashes_Q, hashes_B)
        rows_B = self._order_Q.take(places_B, mode="clip").astype(np.int64) if len(self) else np.full(len(items), -1)
        shards_B, locals_B = self.places(rows_B)
        candidates = zip(shards_B.tolist(), locals_B.tolist(), keys, items, strict=True)
        for number, (shard, local, key, (_, role)) in enumerate(candidates):
            if not len(self) or not self.shards[shard].is_at(local, key, role):
                rows_B[number] = self._search(int(places_B[number]), hashes_B[number], key, role)
        return rows_B

    def rows(self, keys: pa.ChunkedArray, role: str, likely: Iterable[tuple[int, int, int]] = ()) -> NDArray[np.int64]:
        """The row of each key in one role, −1 where there is none; for millions of keys at once.

        `likely`: shards, and where the keys begin and end that may be theirs in their order: those are seen at once.
        """
        rows_K = np.full(len(keys), -1, np.int64)
        chunk_ends = np.cumsum([0, *map(len, keys.chunks)])
        for shard, start, stop in likely:
            number = int(np.searchsorted(chunk_ends, start, side="right")) - 1
            inside = number < keys.num_chunks and stop <= chunk_ends[number + 1]
            # Cut out of its chunk: to cut a column of thousands of chunks takes a look at each.
            piece = keys.chunk(number).slice(start - chunk_ends[number], stop - start) if inside else keys[start:stop]
            text, ends = string_buffers(piece) if inside else column_texts(piece)
            locals_K = self.shards[shard].rows_in_order(text, ends, role)
            if locals_K is not None:
                np.add(locals_K, self.first_rows[shard], out=rows_K[start:stop])
        left = np.flatnonzero(rows_K < 0)
        if len(left):
            rows_K[left] = self._found(keys.take(left) if len(left) < len(keys) else keys, role)
        return rows_K

    def _found(self, keys: pa.ChunkedArray, role: str) -> NDArray[np.int64]:
        found_K = np.full(len(keys), -1, np.int64)
        if not len(self):
            return found_K
        mine = column_texts(keys)
        hashes_K = key_hashes(*mine, np.full(len(keys), role_salt(role), np.uint64)) & ~self._row_bits
        order_K = np.argsort(hashes_K)
        places_K = np.searchsorted(self._hashes_Q, hashes_K[order_K])  # sorted, so that few reads miss the caches
        same_K = self._hashes_Q.take(places_K, mode="clip") == hashes_K[order_K]
        asked_M, rows_M = order_K[same_K], self._order_Q[places_K[same_K]].astype(np.int64)
        of_role_Q = np.concatenate([rows.of_role(role) for rows in self.shards])
        equal_M = of_role_Q[rows_M] & _equal_texts(mine, asked_M, self._texts(), rows_M)
        found_K[asked_M[equal_M]] = rows_M[equal_M]
        for number in asked_M[~equal_M].tolist():  # another key of that hash comes first
            found_K[number] = self.find_one(keys[number].as_py(), role)
        return found_K

    def find_one(self, key: str, role: str) -> int:
        """The row of one (key, role), −1 if there is none."""
        content = key.encode()
        wanted = np.uint64(key_hash(content, role_salt(role))) & ~self._row_bits
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

    def _texts(self) -> Texts:
        """The keys of all rows, one after another."""
        return _joined([(rows.key_bytes, rows.key_ends) for rows in self.shards if len(rows)])

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


def column_texts(keys: pa.ChunkedArray) -> Texts:
    """The strings of an Arrow column, one after another."""
    return _joined([string_buffers(chunk) for chunk in keys.chunks if len(chunk)])


def _joined(pieces: Sequence[tuple[NDArray[np.uint8], NDArray[np.int32]]]) -> Texts:
    if not pieces:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    text = np.concatenate([text[ends[0] : ends[-1]] for text, ends in pieces])
    lengths = np.concatenate([ends[1:] - ends[:-1] for _, ends in pieces])
    return text, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _equal_texts(one: Texts, rows_M: NDArray[np.int64], other: Texts, others_M: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the texts in some rows of one are those in some rows of the other, word by word."""
    sides = [
        (_words(text), ends[rows], np.diff(ends)[rows]) for (text, ends), rows in ((one, rows_M), (other, others_M))
    ]
    (words, starts_M, lengths_M), (other_words, other_starts_M, other_lengths_M) = sides
    equal_M: NDArray[np.bool_] = lengths_M == other_lengths_M
    rows = np.flatnonzero(equal_M)
    for at in range(0, int(lengths_M.max(initial=0)), _WORD):
        rows = rows[lengths_M[rows] > at]
        surplus = _surplus_bits(lengths_M[rows], at)
        differ = (words[starts_M[rows] + at] ^ other_words[other_starts_M[rows] + at]) << surplus
        equal_M[rows[differ != 0]] = False
    return equal_M


def _words(text: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The 8 bytes (little-endian) that begin at every byte, zeros beyond the end."""
    padded = np.concatenate([text, np.zeros(_WORD, np.uint8)])
    return np.ndarray((len(padded) - _WORD + 1,), "<u8", padded, strides=(1,))


def _surplus_bits(lengths: NDArray[np.int64], at: int) -> NDArray[np.uint64]:
    """How many bits of the word at `at` lie beyond the end of a text of some length."""
    return np.maximum(at + _WORD - lengths, 0).astype(np.uint64) * np.uint64(8)


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
    words = _words(key_bytes)
    rows = np.arange(len(hashes_Q))
    for at in range(0, int(lengths_Q.max(initial=0)), _WORD):
        rows = rows[lengths_Q[rows] > at]
        surplus = _surplus_bits(lengths_Q[rows], at)
        word = words[starts_Q[rows] + at] << surplus >> surplus
        mixed = (hashes_Q[rows] ^ word) * np.uint64(_MIX)
        hashes_Q[rows] = mixed ^ (mixed >> np.uint64(_SHIFT))
    return hashes_Q
