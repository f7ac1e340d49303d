"""The micro-batches of ranks form the global batch, whatever the number of ranks and wherever a run was interrupted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.order.copies import Weights
from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.data.order.stream import Order
from llavamod_offline.errors import ConfigError
from tests.llavamod_offline.data.order.cases import Case, cases


@settings(deadline=None)
@given(case=cases(grouped=False), share=st.integers(1, 6), world_size=st.integers(1, 8), step=st.integers(0, 10**9))
def test_ranks_share_the_global_batch(case: Case, share: int, world_size: int, step: int) -> None:
    order = case.order(share * world_size)
    ranks = [BatchSchedule(order, stop=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [schedule.step(step) for schedule in ranks]
    assert all(len(rows) == 1 and len(rows[0]) == share for rows in shares)
    assert [row for rows in shares for row in rows[0]] == order.batch(step).tolist()


@settings(max_examples=50, deadline=None)
@given(case=cases(grouped=True), micro=st.integers(1, 4), micros=st.integers(1, 3), step=st.integers(0, 10**6))
def test_ranks_get_like_lengths_at_a_time(case: Case, micro: int, micros: int, step: int) -> None:
    """The micro-batches, taken from the ranks in turn, are the batch sorted by decreasing length."""
    order = case.order(micro * micros * 2)
    ranks = [BatchSchedule(order, 0, rank=rank, world_size=2, micro_batch_size=micro).step(step) for rank in range(2)]
    dealt = [row for pair in zip(*ranks, strict=True) for rows in pair for row in rows]
    assert dealt == order.batch(step).tolist()


@settings(max_examples=100, deadline=None)
@given(
    case=cases(by_kind=None),
    cuts=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 13)), min_size=1, max_size=4
    ),
)
def test_restarts_on_other_ranks_give_the_same_batches(case: Case, cuts: list[tuple[int, int, int]]) -> None:
    """A run in pieces, each with its own number of ranks and micro-batch size, resumed by its step alone.

    Each piece builds its order anew, as another process would, and may start in the middle of an epoch or window.
    """
    batch_size, start, found = 12, 0, []
    for steps, world_size, size in cuts:
        share = batch_size // world_size
        micro = size if case.lengths is None else share // min(size, share) if share % min(size, share) == 0 else share
        order = case.order(batch_size)
        ranks = [BatchSchedule(order, start + steps, start, rank, world_size, micro) for rank in range(world_size)]
        streams = [list(schedule) for schedule in ranks]
        assert [len(stream) for stream in streams] == [len(schedule) for schedule in ranks]
        assert all(len(stream) == steps * ranks[0].micro_batches for stream in streams)
        assert all(1 <= len(rows) <= micro for stream in streams for rows in stream)
        for step in range(steps):
            part = slice(step * ranks[0].micro_batches, (step + 1) * ranks[0].micro_batches)
            found.append(Counter(row for stream in streams for rows in stream[part] for row in rows))
        start += steps
    order = case.order(batch_size)
    assert found == [Counter(order.batch(step).tolist()) for step in range(start)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"n": 0}, "no samples"),
        ({"weight": 0.0}, "no samples"),
        ({"weight": -0.5}, "weight -0.5: must not be negative"),
        ({"weight": float("nan")}, "weight nan: must not be negative"),
        ({"window": -1}, "window -1: must not be negative"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"world_size": 3}, "batch_size 4: must be a multiple of the number of ranks, 3"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2: must be from 0 to 1"),
        ({"rank": -1, "world_size": 2}, "rank -1 of 2"),
        ({"micro_batch_size": 0}, "micro_batch_size 0: must be at least 1"),
        ({"micro_batch_size": 3, "lengths": True}, "batch_size 4: must be a multiple of micro_batch_size 3 × 1 ranks"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, float], problem: str) -> None:
    given = {"n": 5, "batch_size": 4, "window": 0, "rank": 0, "world_size": 1, "micro_batch_size": None} | settings
    n = int(given["n"] or 0)
    with pytest.raises(ConfigError, match=problem):
        BatchSchedule(
            Order(
                n,
                seed=0,
                batch_size=int(given["batch_size"] or 0),
                window=int(given["window"] or 0),
                weights=Weights(np.zeros(n, int), [settings["weight"]]) if "weight" in settings else None,
                lengths_N=np.ones(n, int) if "lengths" in settings else None,
            ),
            stop=1,
            rank=int(given["rank"] or 0),
            world_size=int(given["world_size"] or 1),
            micro_batch_size=settings.get("micro_batch_size"),  # type: ignore[arg-type]
        )
