"""What decides the order of a run: configuration, set and cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from tests.tiny import tiny_samples
from tests.train.conftest import World
from train.data.sample_order import DEFAULT_WINDOW, make_order, order_settings


class FewInMemory:
    """Stands for a cache whose records do not all fit in memory."""

    fits_in_memory = False
    is_remote = False


@pytest.fixture
def samples(tmp_path: Path) -> SampleSet:
    """Twenty samples in twenty shards, the set saying that its one source comes one and a half times."""
    write_set(tiny_samples(20), tmp_path / "set", shard_samples=1, weights={"tiny": 1.5})
    return SampleSet.open(tmp_path / "set")


def test_windows(world: World, samples: SampleSet) -> None:
    """All shards where everything is at hand; as told; and what comes to all of them is all of them."""
    config = world.config("sft", Path("unused"))
    assert order_settings(config, samples, None, 9).window == 0
    assert order_settings(config, samples, FewInMemory(), 9).window == DEFAULT_WINDOW  # type: ignore[arg-type]
    for window, settled in ((3, 3), (0, 0), (20, 0), (99, 0)):
        told = world.config("sft", Path("unused"), f"data.window={window}")
        assert order_settings(told, samples, None, 9).window == settled


def test_weights_are_the_sets_unless_told(world: World, samples: SampleSet) -> None:
    rows = np.arange(4, 14)
    for told, weights, per_epoch in (
        ((), {"tiny": 1.5}, 15),
        (("data.weights={tiny: 0.5}",), {"tiny": 0.5}, 5),
        (("data.weights={}",), {}, 10),
    ):
        settled = order_settings(world.config("sft", Path("unused"), *told), samples, None, 9)
        assert settled.weights == weights
        order = make_order(settled, samples, rows, seed=0, size=2)
        assert order.per_epoch == per_epoch
        assert set(order.places(0, 2 * per_epoch).tolist()) == set(range(10))


def test_a_source_that_is_not_there(world: World, samples: SampleSet) -> None:
    config = world.config("sft", Path("unused"), "data.weights={coco: 2}")
    with pytest.raises(ConfigError, match=r"data\.weights: set .* has no source 'coco': it has 'tiny'"):
        order_settings(config, samples, None, 9)
    with pytest.raises(ConfigError, match=r"data\.weights\.tiny: -1 must not be negative"):
        world.config("sft", Path("unused"), "data.weights={tiny: -1}")


def test_lengths_are_characters_and_image_tokens(world: World, samples: SampleSet) -> None:
    config = world.config("sft", Path("unused"), "data.group_by_length=true")
    order = make_order(order_settings(config, samples, None, 9), samples, np.arange(20), seed=0, size=4)
    expected = [sum(len(turn.text) for turn in s.turns) + 4 * 9 * len(s.images) for s in tiny_samples(20)]
    assert order.lengths_N is not None
    assert order.lengths_N.tolist() == expected
