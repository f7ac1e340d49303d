"""Runs the tests of the fused losses in both orders of computation."""

from __future__ import annotations

import pytest

from llavamod_offline.losses import fused_linear


@pytest.fixture(params=["chunks", "slabs"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By chunks of positions, or, as on a GPU, by slabs of ids."""
    name: str = request.param
    monkeypatch.setattr(fused_linear, "goes_by_slabs", lambda weight_VD: name == "slabs")
    return name
