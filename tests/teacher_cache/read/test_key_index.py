"""Look-up by (key, role) against a plain dictionary, also where hashes collide."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.format.sequences import SEQUENCE_SCHEMA, SequenceRows
from teacher_cache.read import key_index as index_module
from teacher_cache.read.key_index import SequenceIndex, key_hashes, role_salt

ROLES = ("response", "chosen", "rejected")
Items = list[tuple[str, str]]
ITEMS = st.lists(st.tuples(st.text(max_size=20), st.sampled_from(ROLES)), max_size=30, unique=True)


def make_rows(items: Items) -> SequenceRows:
    """The rows of a shard that holds these sequences; the n-th one has n positions."""
    columns = {
        name: [b"x" * 16 if name.endswith("hash") else number for number in range(len(items))]
        for name in SEQUENCE_SCHEMA.names
    }
    keys, roles = [key for key, _ in items], [role for _, role in items]
    return SequenceRows(pa.RecordBatch.from_pydict({**columns, "key": keys, "role": roles}, schema=SEQUENCE_SCHEMA))


@functools.cache
def poor(hashes: int) -> Callable[..., np.ndarray]:
    """A hash function with only `hashes` values."""
    return lambda *arguments: key_hashes(*arguments) % np.uint64(hashes)


def key_hash(key: bytes, salt: int) -> int:
    """The hash of one key, as `key_hashes` defines it."""
    hashed = salt ^ len(key)
    for at in range(0, len(key), 8):
        hashed = (hashed ^ int.from_bytes(key[at : at + 8], "little")) * 0xBF58476D1CE4E5B9 % 2**64
        hashed ^= hashed >> 32
    return hashed


def check_rows(index: SequenceIndex, shards: list[Items], absent: Items, role: str) -> None:
    """Check many keys of one role at once: in the order of the shards, which is faster, and in any other."""
    of_role = [[key for key, its_role in items if its_role == role] for items in shards]
    known = {item: row for row, item in enumerate(item for items in shards for item in items)}
    others = [key for key, _ in absent]
    keys = [key for some in of_role for key in some]
    ends = np.cumsum([0, *map(len, of_role)]).tolist()
    likely = [(shard, ends[shard], ends[shard + 1]) for shard in range(len(shards))]
    for asked, hints in (
        (keys, likely),
        (keys + others, likely),
        (
            others + keys[::-1],
            [(shard, start, min(stop, len(others))) for shard, start, stop in likely if start <= len(others)],
        ),
        (others + keys, []),
    ):
        for pieces in ([asked[:2], [], asked[2:]], [asked[start:stop] for _, start, stop in likely]):
            column = pa.chunked_array([pa.array(piece, pa.string()) for piece in pieces], pa.string())
            rows = [known.get((key, role), -1) for piece in pieces for key in piece]
            assert index.rows(column, role, hints if len(column) == len(asked) else likely).tolist() == rows


@settings(deadline=None)
@given(shards=st.lists(ITEMS, max_size=4), absent=ITEMS, hashes=st.sampled_from([1, 3, 2**63]))
def test_everything_is_found_where_it_is_and_nothing_else(shards: list[Items], absent: Items, hashes: int) -> None:
    known: dict[tuple[str, str], int] = {}
    unique = []
    for items in shards:
        unique.append([item for item in items if item not in known])
        known |= {item: len(known) + number for number, item in enumerate(unique[-1])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "key_hashes", poor(hashes))
        index = SequenceIndex([make_rows(items) for items in unique])
        asked = [*known, *absent, *list(known)[::-1]]
        assert index.find(asked).tolist() == [known.get(item, -1) for item in asked]
        assert [index.find_one(*item) for item in asked] == [known.get(item, -1) for item in asked]
        assert index.repeated() == []
        for role in ROLES:
            check_rows(index, unique, absent, role)
    assert len(index) == len(known)
    for row, item in enumerate(known):
        shard, local = index.place(row)
        assert unique[shard][local] == item
        (found,), ((start, stop),) = index.spans(np.array([row]))
        assert (found, stop - start) == (shard, local)


@given(keys=st.lists(st.text(max_size=30), min_size=1), role=st.sampled_from(ROLES))
def test_one_hash_is_that_of_many(keys: list[str], role: str) -> None:
    encoded = [key.encode() for key in keys]
    ends = np.cumsum([0, *map(len, encoded)])
    salts = np.full(len(keys), role_salt(role), np.uint64)
    hashes = key_hashes(np.frombuffer(b"".join(encoded), np.uint8), ends, salts).tolist()
    assert hashes == [key_hash(key, role_salt(role)) for key in encoded]


def test_hashes_differ_by_role_length_and_every_byte() -> None:
    keys = [b"", b"\0", b"\0\0", b"\0" * 8, b"\0" * 9, b"a", b"b", b"12345678", b"123456789", b"12345679"]
    hashes = {key_hash(key, role_salt(role)) for key in keys for role in ROLES}
    assert len(hashes) == len(keys) * len(ROLES)
    numbered = [f"sample-{number:06d}".encode() for number in range(100_000)]
    ends = np.arange(0, 13 * len(numbered) + 1, 13)
    many = key_hashes(np.frombuffer(b"".join(numbered), np.uint8), ends, np.zeros(len(numbered), np.uint64))
    assert len(np.unique(many)) == len(numbered)
    assert len(np.unique(many >> np.uint64(44))) > 90_000  # 95,000 of 2²⁰ places are expected by chance


@given(first=ITEMS, second=ITEMS, hashes=st.sampled_from([1, 2**63]))
def test_what_is_there_twice_is_named(first: Items, second: Items, hashes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "key_hashes", poor(hashes))
        index = SequenceIndex([make_rows(first), make_rows(second)])
    assert index.repeated() == [len(first) + number for number, item in enumerate(second) if item in first]
