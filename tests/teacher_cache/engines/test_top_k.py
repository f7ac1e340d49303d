"""The largest values of each row, found group by group, against PyTorch's topk."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.engines import top_k as top_k_module


@settings(deadline=None)
@given(
    width=st.integers(1, 3000),
    count=st.integers(1, 300),
    spacing=st.sampled_from([0.0, 0.5, 100.0]),
    seed=st.integers(0, 10_000),
)
def test_the_largest_are_those_of_topk(width: int, count: int, spacing: float, seed: int) -> None:
    """With and without groups, with ids outside all groups, ties and −∞; which of tied ids is returned is left open."""
    count = min(count, width)
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * 3.0
    if spacing:
        values = (values / spacing).round() * spacing
    values[1, torch.arange(width) % 3 > 0] = float("-inf")
    largest, ids = top_k_module._largest(values, count)
    assert torch.equal(largest, values.topk(count).values)
    assert torch.equal(values.gather(1, ids), largest)
    assert all(len(set(row)) == count for row in ids.tolist())
