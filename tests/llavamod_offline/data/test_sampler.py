"""The order of training: every row once an epoch, whatever the ranks and wherever a run was cut."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.sampler import BatchSchedule, epoch_order, global_batch, rank_batch, stream_rows
from llavamod_offline.errors import ConfigError

ROWS = st.integers(1, 60)
SEEDS = st.integers(-(2**63), 2**64)
MASK = 2**64 - 1


def reference_order(n: int, seed: int, epoch: int) -> list[int]:
    """The permutation by Python's integers, number by number."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
        return value ^ (value >> 31)

    gamma = 0x9E3779B97F4A7C15
    start = mix(mix((seed + gamma) & MASK) ^ epoch)
    return sorted(range(n), key=lambda row: mix((start + (row + 1) * gamma) & MASK))


@settings(deadline=None)
@given(n=ROWS, seed=SEEDS, epoch=st.integers(0, 10**6))
def test_order_is_the_defined_permutation(n: int, seed: int, epoch: int) -> None:
    assert epoch_order(n, seed, epoch).tolist() == reference_order(n, seed, epoch)


def test_order_never_changes() -> None:
    """A run resumed under another version of any library must go on in the same order."""
    assert epoch_order(10, 0, 0).tolist() == [6, 7, 1, 2, 9, 0, 5, 8, 3, 4]
    assert epoch_order(10, 0, 1).tolist() == [9, 6, 3, 7, 5, 1, 4, 0, 2, 8]
    assert epoch_order(10, 1, 0).tolist() == [5, 4, 7, 1, 0, 2, 6, 3, 8, 9]


def test_order_is_well_mixed() -> None:
    """Each row comes at each place about equally often over epochs and seeds, and neighbours part."""
    n, epochs = 8, 4000
    orders = np.array([epoch_order(n, seed, epoch) for seed in range(4) for epoch in range(epochs // 4)])
    counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi_square < 95  # 49 degrees of freedom: one in 10⁴ for a fair shuffle
    followed = float((np.diff(orders) == 1).mean())
    assert followed == pytest.approx(1 / n, abs=0.01)


@settings(max_examples=200, deadline=None)
@given(n=ROWS, batch_size=st.integers(1, 100), seed=SEEDS, epochs=st.integers(1, 4))
def test_each_epoch_has_every_row_once(n: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = -(-n * epochs // batch_size)
    stream = [row for step in range(steps) for row in global_batch(step, n=n, batch_size=batch_size, seed=seed)]
    assert all(len(global_batch(step, n=n, batch_size=batch_size, seed=seed)) == batch_size for step in range(steps))
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_an_epochs_end_is_filled_from_the_next() -> None:
    last = global_batch(2, n=10, batch_size=4, seed=0)
    assert last == [*epoch_order(10, 0, 0)[8:], *epoch_order(10, 0, 1)[:2]]
    assert global_batch(0, n=3, batch_size=7, seed=5) == stream_rows(0, 7, n=3, seed=5)


@settings(deadline=None)
@given(n=ROWS, share=st.integers(1, 6), world_size=st.integers(1, 8), seed=SEEDS, step=st.integers(0, 10**9))
def test_ranks_share_the_global_batch(n: int, share: int, world_size: int, seed: int, step: int) -> None:
    batch_size = share * world_size
    shares = [
        rank_batch(step, n=n, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    whole = global_batch(step, n=n, batch_size=batch_size, seed=seed)
    assert all(len(rows) == share for rows in shares)
    assert [row for rows in shares for row in rows] == whole


@settings(max_examples=50, deadline=None)
@given(
    n=ROWS,
    seed=SEEDS,
    cuts=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 13)), min_size=1, max_size=4
    ),
)
def test_restarts_on_other_ranks_give_the_same_batches(n: int, seed: int, cuts: list[tuple[int, int, int]]) -> None:
    """A run in pieces, each on its own number of ranks and size of micro-batch, resumed by its step alone."""
    batch_size, start, found = 12, 0, []
    for steps, world_size, micro in cuts:
        ranks = [
            BatchSchedule(n, batch_size, seed, start + steps, start, rank, world_size, micro)
            for rank in range(world_size)
        ]
        streams = [list(schedule) for schedule in ranks]
        assert [len(stream) for stream in streams] == [len(schedule) for schedule in ranks]
        assert all(len(stream) == steps * ranks[0].micro_batches for stream in streams)
        assert all(1 <= len(rows) <= micro for stream in streams for rows in stream)
        for step in range(steps):
            part = slice(step * ranks[0].micro_batches, (step + 1) * ranks[0].micro_batches)
            found.append(Counter(row for stream in streams for rows in stream[part] for row in rows))
        start += steps
    expected = [Counter(global_batch(step, n=n, batch_size=batch_size, seed=seed)) for step in range(start)]
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"n": 0}, "0 rows to choose from"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"world_size": 3}, "batch_size 4: must be a multiple of the number of ranks, 3"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2: must be from 0 to 1"),
        ({"rank": -1, "world_size": 2}, "rank -1 of 2"),
        ({"micro_batch_size": 0}, "micro_batch_size 0: must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BatchSchedule(**({"n": 5, "batch_size": 4, "seed": 0, "stop": 1} | settings))
