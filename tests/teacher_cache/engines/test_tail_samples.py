"""Systematic tail samples: unbiased, reproducible, and never an id without weight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.engines.tail_samples import sequence_uniforms, tail_sample_budget, tail_samples


def _slow_tail_samples(weights: np.ndarray, uniform: float, budget: int) -> dict[int, int]:
    """One row by the definition: points (u + j) / m on the cumulative weights."""
    cumulated = np.cumsum(weights.astype(np.float64))
    found: dict[int, int] = {}
    for step in range(budget):
        point = (uniform + step) / budget * cumulated[-1]
        index = int(np.searchsorted(cumulated, point, side="right"))
        found[index] = found.get(index, 0) + 1
    return found


def _drawn(weights: torch.Tensor, uniforms: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """The samples of all rows, one row after another; slots beyond a row's budget hold ids of the vocabulary too."""
    ids = tail_samples(weights, uniforms, budget, int(budget.max()) + 1)
    assert bool(((ids >= 0) & (ids < weights.shape[1])).all())
    return ids[torch.arange(ids.shape[1]) < budget[:, None]]


@given(
    width=st.integers(1, 700),
    budgets=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    empty_share=st.floats(0.0, 0.95),
)
def test_draws_follow_the_definition(width: int, budgets: list[int], seed: int, empty_share: float) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.pareto(1.0, (len(budgets), width)).astype(np.float32)
    weights[generator.random(weights.shape) < empty_share] = 0.0
    weights[:, generator.integers(width)] += 1.0
    uniforms = generator.random(len(budgets))
    ids = _drawn(torch.from_numpy(weights), torch.from_numpy(uniforms), torch.tensor(budgets))
    assert len(ids) == sum(budgets)
    start = 0
    for row, budget in enumerate(budgets):
        drawn = ids[start : start + budget].tolist()
        start += budget
        assert drawn == sorted(drawn)
        got = Counter(drawn)
        assert all(weights[row, token] > 0 for token in got)
        wanted = _slow_tail_samples(weights[row], float(uniforms[row]), budget)
        # A point within float32 rounding of an interval's edge may fall on either side of it.
        moved = sum(abs(got[token] - wanted.get(token, 0)) for token in got.keys() | wanted.keys())
        assert moved <= 2


def test_draws_are_unbiased_to_well_below_one_percent() -> None:
    """The mean of the reconstructed tail converges to the tail as 1/√n, with error bars measured on the data."""
    generator = np.random.default_rng(0)
    weights = generator.pareto(0.8, 2000).astype(np.float32)
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    budget, replicas = 12, 40_000
    uniforms = torch.from_numpy(
        np.concatenate([sequence_uniforms(7, f"sample-{i}", "response", 100) for i in range(replicas // 100)])
    )
    found = np.zeros(2000)
    squares = np.zeros(2000)
    for start in range(0, replicas, 2000):
        ids = _drawn(
            torch.from_numpy(weights).expand(2000, -1),
            uniforms[start : start + 2000],
            torch.full((2000,), budget),
        )
        table = np.zeros((2000, 2000))
        np.add.at(table, (np.repeat(np.arange(2000), budget), ids.numpy()), 1)
        found += table.sum(0)
        squares += (table**2).sum(0)
    mean = found / replicas
    deviation = np.sqrt(np.maximum(squares / replicas - mean**2, 1e-12) / replicas)
    common = share * budget * replicas > 400
    assert common.sum() > 50
    assert np.all(np.abs(mean - share * budget)[common] < 5.5 * deviation[common] + 1e-6)
    # A band of ids is far less noisy than one id: here a bias of 1 % would be five standard errors.
    by_share = np.argsort(-share)
    bands = [b for b in np.split(by_share, np.searchsorted(np.cumsum(share[by_share]), [0.3, 0.6])) if len(b)]
    for band in bands:
        assert abs(found[band].sum() / (replicas * budget * share[band].sum()) - 1) < 0.01


def test_draws_over_a_grid_of_uniforms_integrate_to_the_tail() -> None:
    """Over all u, a run of neighbouring ids is drawn in exact proportion to its weight: no noise can hide a bias."""
    weights = np.random.default_rng(1).pareto(0.8, 3000).astype(np.float32)
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    grid, budget = 4000, 12
    ids = _drawn(
        torch.from_numpy(weights).expand(grid, -1),
        (torch.arange(grid, dtype=torch.float64) + 0.5) / grid,
        torch.full((grid,), budget),
    )
    found = np.bincount(ids.numpy(), minlength=3000) / grid
    for run in np.split(np.arange(3000), np.searchsorted(np.cumsum(share), np.arange(1, 20) / 20)):
        assert abs(found[run].sum() - budget * share[run].sum()) < 2.01 / grid


def test_uniforms_depend_on_nothing_but_their_name() -> None:
    long = sequence_uniforms(3, "a", "response", 500)
    assert np.array_equal(long[:20], sequence_uniforms(3, "a", "response", 20))
    others = [
        sequence_uniforms(*name, 500) for name in [(4, "a", "response"), (3, "b", "response"), (3, "a", "chosen")]
    ]
    assert all(not np.any(long == other) for other in others)
    assert long.min() >= 0.0
    assert long.max() < 1.0


def test_uniforms_are_uniform_and_uncorrelated_along_and_across_sequences() -> None:
    table = np.stack([sequence_uniforms(0, str(i), "response", 256) for i in range(256)])
    histogram, _ = np.histogram(table, bins=64, range=(0, 1))
    assert np.sum((histogram - 1024.0) ** 2 / 1024.0) < 110  # χ² with 63 degrees of freedom: 99.98 %
    centred = table - table.mean()
    for lagged in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(lagged.mean()) < 5 * (1 / 12) / np.sqrt(lagged.size)


def test_the_stream_of_uniforms_is_fixed_for_ever() -> None:
    """Caches hold samples drawn with these numbers: changing the generator would change the format."""
    assert sequence_uniforms(0, "key", "response", 3).tolist() == [
        0.6069473063476964,
        0.7722862511487943,
        0.9719183232724762,
    ]


def test_budget_grows_with_the_mass_and_is_zero_without_a_tail() -> None:
    log_mass = torch.tensor([float("-inf"), -80.0, np.log(0.009), np.log(0.055), np.log(0.5)])
    assert tail_sample_budget(log_mass, 24, 100.0).tolist() == [0, 1, 1, 6, 24]
    assert tail_sample_budget(log_mass, 0, 100.0).tolist() == [0, 0, 0, 0, 0]
