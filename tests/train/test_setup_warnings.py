"""What is worth a warning before the first step, although it is not an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.train.conftest import World
from train.run import train


@pytest.mark.parametrize(("size", "warned"), [(24, False), (32, True)])
def test_a_batch_that_is_larger_than_the_set(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, warned: bool
) -> None:
    """Every step would repeat samples, since the set has 24."""
    with caplog.at_level(logging.WARNING):
        train(world.config("sft", tmp_path / "run", f"batch.global_size={size}", "batch.micro_size=8", "steps=1"))
    line = f"batch.global_size: {size} is more than the 24 samples of an epoch, so every step repeats some: lower it"
    assert ([record.getMessage() for record in caplog.records].count(line) == 1) == warned
