"""The order of training: every sample as often per epoch as its weight says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.order.copies import Weights
from llavamod_offline.data.order.grouping import Rows
from llavamod_offline.data.order.stream import Mark, Order
from tests.llavamod_offline.data.order.cases import ROWS, SEEDS, Case, cases, reference_hash


def epoch_order(n: int, seed: int, epoch: int) -> Rows:
    """One epoch without windows, weights or lengths."""
    return Order(n, seed=seed, batch_size=1).places(epoch * n, (epoch + 1) * n)


def reference_order(n: int, seed: int, epoch: int) -> list[int]:
    """The permutation, number by number."""
    return sorted(range(n), key=lambda row: reference_hash(row, seed, epoch))


@settings(deadline=None)
@given(n=ROWS, seed=SEEDS, epoch=st.integers(0, 10**6))
def test_order_is_the_defined_permutation(n: int, seed: int, epoch: int) -> None:
    assert epoch_order(n, seed, epoch).tolist() == reference_order(n, seed, epoch)


def test_order_never_changes() -> None:
    """A run resumed under another version of any library must continue in the same order."""
    assert epoch_order(10, 0, 0).tolist() == [6, 7, 1, 2, 9, 0, 5, 8, 3, 4]
    assert epoch_order(10, 0, 1).tolist() == [9, 6, 3, 7, 5, 1, 4, 0, 2, 8]
    assert epoch_order(10, 1, 0).tolist() == [5, 4, 7, 1, 0, 2, 6, 3, 8, 9]


def test_order_is_well_mixed() -> None:
    """Over epochs and seeds, each row comes at each place about equally often, and neighbours are separated."""
    n, epochs = 8, 4000
    orders = np.array([epoch_order(n, seed, epoch) for seed in range(4) for epoch in range(epochs // 4)])
    counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi_square < 95  # 49 degrees of freedom: one in 10⁴ for a fair shuffle
    followed = float((np.diff(orders) == 1).mean())
    assert followed == pytest.approx(1 / n, abs=0.01)


@settings(max_examples=80, deadline=None)
@given(case=cases(grouped=False), batch_size=st.integers(1, 9), epochs=st.integers(1, 3))
def test_the_stream_is_the_defined_one(case: Case, batch_size: int, epochs: int) -> None:
    order = case.order(batch_size)
    expected = [place for epoch in range(epochs) for place in case.epoch(epoch)[0]]
    assert order.per_epoch * epochs == len(expected)
    assert order.places(0, len(expected)).tolist() == expected
    steps = len(expected) // batch_size
    assert [place for step in range(steps) for place in order.batch(step).tolist()] == expected[: steps * batch_size]


@settings(max_examples=100, deadline=None)
@given(case=cases(by_kind=None), batch_size=st.integers(1, 30), epochs=st.integers(1, 4))
def test_each_epoch_has_every_sample_as_often_as_declared(case: Case, batch_size: int, epochs: int) -> None:
    """Whatever the windows, weights, lengths and kinds; and each window holds only samples of its own shards."""
    order = case.order(batch_size)
    stream = order.places(0, epochs * order.per_epoch).tolist()
    for epoch in range(epochs):
        found = Counter(stream[epoch * order.per_epoch : (epoch + 1) * order.per_epoch])
        assert [found[place] for place in range(case.n)] == case.copies(epoch)
        for start, stop in case.epoch(epoch)[1]:
            window = order.window_at(epoch * order.per_epoch + start)
            assert (window.start, window.stop) == (epoch * order.per_epoch + start, epoch * order.per_epoch + stop)
            assert {case.shard_of[place] for place in stream[window.start : window.stop]} == set(window.shards.tolist())
    if case.weights is None:
        assert sorted(stream) == sorted(list(range(case.n)) * epochs)


def test_every_sample_gets_its_turn() -> None:
    """With weight 0.4, each of 10 samples comes twice in five epochs of 4 each; with 1.5, three times in two."""
    for weight, epochs, times in ((0.4, 5, 2), (1.5, 2, 3), (0.001, 10, 1)):
        order = Order(10, seed=3, batch_size=1, weights=Weights(np.zeros(10, int), [weight]))
        assert order.per_epoch == max(1, 10 * weight)
        assert sorted(order.places(0, epochs * order.per_epoch).tolist()) == sorted(list(range(10)) * times)


@settings(max_examples=100, deadline=None)
@given(case=cases(grouped=True), batch_size=st.integers(1, 12))
def test_whole_batches_of_a_window_are_of_like_length(case: Case, batch_size: int) -> None:
    """The length ranges of a window's whole batches do not overlap."""
    order = case.order(batch_size)
    assert case.lengths is not None
    for start, stop in case.epoch(0)[1]:
        steps = range(-(-start // batch_size), stop // batch_size)
        batches = [[case.lengths[place] for place in order.batch(step).tolist()] for step in steps]
        assert all(batch == sorted(batch, reverse=True) for batch in batches)
        batches.sort(reverse=True)
        assert all(one[-1] >= other[0] for one, other in pairwise(batches))


@settings(max_examples=100, deadline=None)
@given(case=cases(by_kind=True), batch_size=st.integers(1, 12))
def test_whole_batches_of_a_window_are_of_one_kind_but_for_one(case: Case, batch_size: int) -> None:
    """And of like length within a kind, if lengths are given."""
    order = case.order(batch_size)
    kinds = case.kinds
    assert kinds is not None
    for start, stop in case.epoch(0)[1]:
        steps = range(-(-start // batch_size), stop // batch_size)
        batches = [order.batch(step).tolist() for step in steps]
        pure = [batch for batch in batches if len({kinds[place] for place in batch}) == 1]
        assert len(pure) >= len(batches) - 1
        for kind in (True, False):
            lengths = [[case.lengths[p] for p in batch] for batch in pure if kinds[batch[0]] == kind and case.lengths]
            lengths.sort(reverse=True)
            full = lengths if len(pure) == len(batches) else []  # a mixed batch may hold the last samples of each kind
            assert all(one[-1] >= other[0] for one, other in pairwise(full))


def test_batches_of_one_kind_come_in_a_random_order() -> None:
    order = Order(64, seed=0, batch_size=8, kinds_N=np.arange(64) % 2 == 0)
    first = [int(order.batch(step)[0]) % 2 for step in range(8)]
    assert sorted(first) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_batches_by_length_come_in_a_random_order() -> None:
    order = Order(64, seed=0, batch_size=8, lengths_N=np.arange(64))
    first = [int(order.batch(step)[0]) for step in range(8)]
    assert sorted(first) == list(range(7, 64, 8))
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_an_epochs_end_is_filled_from_the_next() -> None:
    order = Order(10, seed=0, batch_size=4)
    assert order.batch(2).tolist() == [*epoch_order(10, 0, 0)[8:], *epoch_order(10, 0, 1)[:2]]
    assert Order(3, seed=5, batch_size=7).batch(0).tolist() == [
        *epoch_order(3, 5, 0), *epoch_order(3, 5, 1), epoch_order(3, 5, 2)[0]
    ]  # fmt: skip


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    window=st.integers(0, 3),
    taken=st.sets(st.integers(0, 29)),
    added=st.integers(0, 4),
    position=st.integers(0, 70),
    seed=st.integers(0, 3),
)
def test_after_a_change_of_samples_an_epoch_goes_on_with_those_not_seen(
    sizes: list[int], window: int, taken: set[int], added: int, position: int, seed: int
) -> None:
    """Some samples are removed, others appended: those already seen in the epoch are not seen again, the rest are."""
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    before = Order(len(shard_of), seed=seed, batch_size=3, shards_N=np.array(shard_of), window=window)
    left = [place for place in range(len(shard_of)) if place not in taken]
    if {shard_of[place] for place in left} != set(shard_of):
        return  # a shard is gone, so windows hold other shards
    numbers = [*left, *range(len(shard_of), len(shard_of) + added)]
    shards = [*(shard_of[place] for place in left), *([len(sizes) - 1] * added)]
    after = Order(len(numbers), seed=seed, batch_size=3, shards_N=np.array(shards), window=window)
    after.renumber(np.array(numbers))
    mark = Mark(**json.loads(json.dumps(asdict(before.mark(position)))))
    found = after.find(mark)
    epoch, begin = divmod(position, before.per_epoch)[0], position // before.per_epoch * before.per_epoch
    seen = before.places(begin, position).tolist()
    rest = [numbers[place] for place in after.places(found, (epoch + 1) * after.per_epoch).tolist()]
    old = [number for number in rest if number < len(shard_of)]
    assert sorted(old) == sorted(set(left) - set(seen))
    assert old == [place for place in before.places(position, begin + before.per_epoch).tolist() if place in left]
    after.renumber(np.array(numbers), found - 7 * 3)
    assert after.position(7) == found
    assert after.batch(7).tolist() == after.places(found, found + 3).tolist()


def test_numbers_of_ones_own_shuffle_copies_too() -> None:
    weights = Weights(np.zeros(6, int), [2.5])
    order = Order(6, seed=1, batch_size=2, weights=weights)
    order.renumber(np.array([5, 9, 2, 40, 0, 7]))
    epoch = order.places(0, order.per_epoch).tolist()
    assert len(epoch) == 15
    assert set(Counter(epoch).values()) == {2, 3}
    assert order.places(15, 30).tolist() != epoch
