"""The columnar join gives what a loop over keys would."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError
from tests.tiny import write_tiny_set
from train.data.join import Join, join

N = 23


class SomeKeys:
    """A stand-in for a cache: it has some keys of each role."""

    path = "some/cache"

    def __init__(self, **known: set[str]) -> None:
        self.known = known

    def assigned(self, rows: NDArray[np.int64]) -> list[tuple[SomeKeys, NDArray[np.int64]]]:
        return [(self, rows)]

    def rows(self, keys: pa.ChunkedArray, role: str, shards: Mapping[str, range] | None = None) -> NDArray[np.int64]:
        assert shards is None or sum(len(rows) for rows in shards.values()) == len(keys)
        places = {key: row for row, key in enumerate(sorted(self.known[role]))}
        return np.array([places.get(key, -1) for key in keys.to_pylist()])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    return SampleSet.open(
        write_tiny_set(tmp_path_factory.mktemp("join") / "pairs", N, preference=True, shard_samples=5)
    )


def joined(samples: SampleSet, cache: Any, *, missing: str = "drop", holdout: int = 0, seed: int = 0) -> Join:
    return join(samples, ("chosen", "rejected"), cache, missing=missing, holdout=holdout, seed=seed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    absent=st.lists(st.sets(st.integers(0, N - 1)), min_size=2, max_size=2),
    holdout=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_rows_and_their_hash(pairs: SampleSet, absent: list[set[int]], holdout: int, seed: int) -> None:
    """Samples with both records are kept; the hash is that of the kept keys' text."""
    known = [{key for row, key in enumerate(pairs.keys) if row not in rows} for rows in absent]
    cache = SomeKeys(chosen=known[0], rejected=known[1])
    usable = [row for row in range(N) if row not in absent[0] | absent[1]]
    if len(usable) <= holdout:
        with pytest.raises(
            DataError, match=r"nothing is left: (lower data\.holdout|capture those that cache\.path lacks)"
        ):
            joined(pairs, cache, holdout=holdout, seed=seed)
        return
    found = joined(pairs, cache, holdout=holdout, seed=seed)
    assert sorted([*found.rows.tolist(), *found.holdout.tolist()]) == usable
    assert found.rows.tolist() == sorted(found.rows.tolist())
    assert (len(found.holdout), found.missing) == (holdout, N - len(usable))
    for role, its_keys in cache.known.items():
        records = found.records[role][found.rows].tolist()
        assert [sorted(its_keys)[row] for row in records] == [pairs.keys[row] for row in found.rows.tolist()]
    text = "\n".join(pairs.keys[row] for row in found.rows.tolist())
    assert found.kept_hash == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_held_out_depends_on_seed_and_key_alone(pairs: SampleSet, tmp_path: Path) -> None:
    """Not on the shards; another seed holds out others; if samples are dropped, the same ones stay held out."""
    everything = SomeKeys(chosen=set(pairs.keys), rejected=set(pairs.keys))
    first = joined(pairs, everything, holdout=6)
    other = SampleSet.open(write_tiny_set(tmp_path / "other", N, preference=True, shard_samples=9))
    assert joined(other, everything, holdout=6).holdout.tolist() == first.holdout.tolist()
    assert joined(pairs, everything, holdout=6, seed=1).holdout.tolist() != first.holdout.tolist()
    fewer = set(pairs.keys) - {pairs.keys[row] for row in first.rows[:5].tolist()}
    assert joined(pairs, SomeKeys(chosen=fewer, rejected=fewer), holdout=6).holdout.tolist() == first.holdout.tolist()


def test_an_error_names_the_first_keys(pairs: SampleSet) -> None:
    cache = SomeKeys(chosen=set(pairs.keys[4:]), rejected=set(pairs.keys[:20]))
    first = ", ".join(pairs.keys[:3])
    with pytest.raises(
        DataError, match=rf"7 of 23 samples have no record in cache 'some/cache' \({first}, …\): capture"
    ):
        joined(pairs, cache, missing="error")
