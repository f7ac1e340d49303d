"""What determines the order of a run: configuration, set and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from tests.tiny import tiny_samples
from tests.train.conftest import World
from train.data.sample_order import DEFAULT_WINDOW, OrderSettings, make_order, order_settings


class FewInMemory:
    """A stand-in for a cache whose records do not all fit in memory."""

    fits_in_memory = False
    is_remote = False


def settled(
    samples: SampleSet,
    cache: Any = None,
    window: int | None = None,
    weights: dict[str, float] | None = None,
    image_tokens: int | None = None,
) -> OrderSettings:
    return order_settings(samples, cache, window=window, weights=weights, image_tokens=image_tokens)


@pytest.fixture
def samples(tmp_path: Path) -> SampleSet:
    """Twenty samples in twenty shards; the set gives its only source the weight 1.5."""
    write_set(tiny_samples(20), tmp_path / "set", shard_samples=1, weights={"tiny": 1.5})
    return SampleSet.open(tmp_path / "set")


def test_windows(samples: SampleSet) -> None:
    """All shards if everything fits in memory; otherwise as configured; a window as large as the set is all shards."""
    assert settled(samples).window == 0
    assert settled(samples, FewInMemory()).window == DEFAULT_WINDOW
    for window, expected in ((3, 3), (0, 0), (20, 0), (99, 0)):
        assert settled(samples, window=window).window == expected


def test_weights_are_the_sets_unless_told(samples: SampleSet) -> None:
    rows = np.arange(4, 14)
    told: dict[str, float] | None
    for told, weights, per_epoch in ((None, {"tiny": 1.5}, 15), ({"tiny": 0.5}, {"tiny": 0.5}, 5), ({}, {}, 10)):
        found = settled(samples, weights=told)
        assert found.weights == weights
        order = make_order(found, samples, rows, seed=0, size=2)
        assert order.per_epoch == per_epoch
        assert set(order.places(0, 2 * per_epoch).tolist()) == set(range(10))


def test_a_source_that_is_not_there(world: World, samples: SampleSet) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights: set .* has no source 'coco': choose from 'tiny'"):
        settled(samples, weights={"coco": 2})
    with pytest.raises(ConfigError, match=r"data\.weights\.tiny is -1: must not be negative"):
        world.config("sft", Path("unused"), "data.weights={tiny: -1}")


def test_lengths_are_characters_and_image_tokens(samples: SampleSet) -> None:
    order = make_order(settled(samples, image_tokens=9), samples, np.arange(20), seed=0, size=4)
    expected = [sum(len(turn.text) for turn in s.turns) + 4 * 9 * len(s.images) for s in tiny_samples(20)]
    assert order.lengths_N is not None
    assert order.lengths_N.tolist() == expected


def test_batches_of_one_modality_and_the_setting_in_what_a_run_is_resumed_by(samples: SampleSet) -> None:
    plain = settled(samples)
    chosen = order_settings(samples, None, window=None, weights={}, image_tokens=9, by_modality=True)
    assert "by_modality" not in plain.describe()  # as in runs of earlier versions
    assert chosen.describe()["by_modality"]
    order = make_order(chosen, samples, np.arange(20), seed=0, size=5)
    images = [bool(sample.images) for sample in tiny_samples(20)]
    kinds = [{images[place] for place in order.batch(step).tolist()} for step in range(4)]
    assert sorted(map(len, kinds)) == [1, 1, 1, 1]
    assert kinds.count({False}) == 1
