"""Look-up of sequences by (key, role): all hashes are sorted once, and keys are compared where hashes are equal.

Hashes are computed on first use and kept in memory only; keys in the order of the cache are found without them. Arrow's
`index_in` would rebuild its table of all keys for every batch (0.25 s at a million keys, against 0.1 ms), so it is
only used to look up many keys at once.

Shape suffixes: Q sequences of a cache (or of one shard), B of them looked up at once, K keys of a column.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.format.sequences import SequenceRows, string_buffers

_WORD = 8
_MIX = 0xBF58476D1CE4E5B9
_SHIFT = 32
# Concatenated strings: their bytes, and the offsets between them.
Texts = tuple[NDArray[np.uint8], NDArray[np.int64]]


class SequenceIndex:
    """The row of each (key, role); rows are numbered across shards, in their order.

    `counts`: the number of rows of each shard, given where shards should not be opened to count them.
    """

    def __init__(self, shards: Sequence[SequenceRows], counts: Sequence[int] | None = None) -> None:
        self.shards = shards
        self.first_rows = np.cumsum([0, *([len(rows) for rows in shards] if counts is None else counts)])
        # The row replaces the lowest bits of a hash: sorting numbers is several times as fast as sorting indices.
        self._row_bits = np.uint64((1 << len(self).bit_length()) - 1)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.integer]]:
        """The hashes of all rows, sorted, and the row of each."""
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
        """The row of each (key, role), −1 if missing."""
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
        """The row of each key in one role, −1 if missing; for millions of keys at once.

        `likely`: shards, each with the range of `keys` that are probably its keys in order, which is checked first.
        """
        rows_K = np.full(len(keys), -1, np.int64)
        chunk_ends = np.cumsum([0, *map(len, keys.chunks)])
        for shard, start, stop in likely:
            number = int(np.searchsorted(chunk_ends, start, side="right")) - 1
            inside = number < keys.num_chunks and stop <= chunk_ends[number + 1]
            # Slice the chunk: slicing a column of thousands of chunks visits each of them.
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
        of_role_Q = np.concatenate([np.zeros(0, np.bool_), *(rows.of_role(role) for rows in self.shards)])
        stored = pa.chunked_array([rows.table.column("key") for rows in self.shards], pa.string())
        places_K = pc.index_in(keys, value_set=stored.filter(pa.array(of_role_Q))).fill_null(-1).to_numpy()
        rows_K: NDArray[np.int64] = np.append(np.flatnonzero(of_role_Q), -1)[places_K]
        return rows_K

    def find_one(self, key: str, role: str) -> int:
        """The row of one (key, role), −1 if missing."""
        return int(self.find([(key, role)])[0])

    def spans(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """The shards of rows, and the range of the positions of each in its shard."""
        shards_B, locals_B = self.places(rows_B)
        spans = np.zeros((len(rows_B), 2), np.int64)
        for shard in np.unique(shards_B).tolist():
            mine = shards_B == shard
            spans[mine] = self.shards[shard].starts_Q[np.stack([locals_B[mine], locals_B[mine] + 1], 1)]
        return shards_B, [(start, stop) for start, stop in spans.tolist()]

    def places(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of rows, and their rows in the shards' tables."""
        shards_B = np.searchsorted(self.first_rows, rows_B, side="right") - 1
        return shards_B, rows_B - self.first_rows[shards_B]

    def repeated(self) -> list[int]:
        """The rows whose (key, role) an earlier row already has."""
        found = []
        for place in (np.flatnonzero(self._hashes_Q[1:] == self._hashes_Q[:-1]) + 1).tolist():
            first = int(np.searchsorted(self._hashes_Q, self._hashes_Q[place]))
            rows = sorted(self._order_Q[first : place + 1].tolist())
            names = [self._name(row) for row in rows]
            found += [row for number, row in enumerate(rows) if names[number] in names[:number]]
        return sorted(set(found))

    def _texts(self) -> Texts:
        """The keys of all rows, concatenated."""
        return _joined([(rows.key_bytes, rows.key_ends) for rows in self.shards if len(rows)])

    def _name(self, row: int) -> tuple[str, str]:
        shard, local = self.place(row)
        entry = self.shards[shard].sequence(local)
        return entry.key, entry.role

    def _search(self, place: int, wanted: np.uint64, key: bytes, role: str) -> int:
        """Compare the key of every row that has this hash, which different keys may share."""
        while place < len(self) and self._hashes_Q[place] == wanted:
            row = int(self._order_Q[place])
            shard, local = self.place(row)
            if self.shards[shard].is_at(local, key, role):
                return row
            place += 1
        return -1

    def place(self, row: int) -> tuple[int, int]:
        """The shard of a row, and its row in the shard's table."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return shard, row - int(self.first_rows[shard])


def column_texts(keys: pa.ChunkedArray) -> Texts:
    """The strings of an Arrow column, concatenated."""
    return _joined([string_buffers(chunk) for chunk in keys.chunks if len(chunk)])


def _joined(pieces: Sequence[tuple[NDArray[np.uint8], NDArray[np.int32]]]) -> Texts:
    if not pieces:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    text = np.concatenate([text[ends[0] : ends[-1]] for text, ends in pieces])
    lengths = np.concatenate([ends[1:] - ends[:-1] for _, ends in pieces])
    return text, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@functools.cache
def role_salt(role: str) -> int:
    """The initial value of a role's hashes."""
    return int.from_bytes(hashlib.blake2b(role.encode(), digest_size=_WORD).digest(), "little")


def key_hashes(
    key_bytes: NDArray[np.uint8], ends_Q: NDArray[np.integer], salts_Q: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """64-bit hashes of keys concatenated in `key_bytes`, key q from `ends_Q[q]` to `ends_Q[q + 1]`.

    Each starts as salt xor length; then every 8 bytes of the key (little-endian, zeros after its end) are xored and
    mixed in: h ← h · BF58476D1CE4E5B9₁₆, h ← h ⊕ (h ≫ 32), modulo 2⁶⁴.
    """
    starts_Q, lengths_Q = ends_Q[:-1].astype(np.int64), np.diff(ends_Q).astype(np.int64)
    hashes_Q = salts_Q ^ lengths_Q.astype(np.uint64)
    # The 8 bytes that begin at every byte, zeros beyond the end.
    words = np.ndarray(
        (len(key_bytes) + 1,), "<u8", np.concatenate([key_bytes, np.zeros(_WORD, np.uint8)]), strides=(1,)
    )
    rows = np.arange(len(hashes_Q))
    for at in range(0, int(lengths_Q.max(initial=0)), _WORD):
        rows = rows[lengths_Q[rows] > at]
        surplus = np.maximum(at + _WORD - lengths_Q[rows], 0).astype(np.uint64) * np.uint64(8)  # bits beyond the end
        word = words[starts_Q[rows] + at] << surplus >> surplus
        mixed = (hashes_Q[rows] ^ word) * np.uint64(_MIX)
        hashes_Q[rows] = mixed ^ (mixed >> np.uint64(_SHIFT))
    return hashes_Q
