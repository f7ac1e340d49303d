"""Several caches as one: the rows and records of a mixture of teachers, and of one cache per source."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError
from teacher_cache.read.reader import open_cache
from teacher_cache.read.several import BySource, Mixture, SeveralCaches
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_samples, write_tiny_llava


@pytest.fixture(scope="module")
def caches(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Caches of the same set by two teachers."""
    folder = tmp_path_factory.mktemp("several")
    other = write_tiny_llava(folder / "teacher", hidden=32, layers=1, seed=5)
    world.run(folder / "one")
    world.run(folder / "other", f"teacher={other}")
    return folder / "one", folder / "other"


def test_a_mixture_reads_every_sequence_from_all(world: World, caches: tuple[Path, Path]) -> None:
    parts = [open_cache(path) for path in caches]
    both = SeveralCaches(parts, Mixture((0.25, 0.75), by_samples=True))
    samples = SampleSet.open(world.samples)
    rows = both.rows(samples.index.column("key"), "response", samples.shard_rows)
    assert (rows >= 0).all()
    assert both.digest not in {part.digest for part in parts}
    chosen = rows[[7, 2, 20]]
    items = parts[0].items(chosen.tolist())
    log_probs = [part.records(items).target_log_probs_N.astype(np.float64) for part in parts]
    expected_N = np.log(0.25 * np.exp(log_probs[0]) + 0.75 * np.exp(log_probs[1]))
    targets = both.targets(chosen)
    assert np.allclose(targets.target_log_probs_N.numpy(), expected_N, atol=1e-5)
    found = both.sequences(chosen)
    assert sum(one.sum_log_prob for one in found) == pytest.approx(expected_N.sum())
    assert [one.key for one in found] == [key for key, _ in items]
    profile_V = both.tail_profile
    assert profile_V is not None
    own = [part.tail_sums() / part.positions for part in parts]
    expected_V = 0.25 * own[0] + 0.75 * own[1]
    assert np.allclose(profile_V.numpy(), expected_V / expected_V.sum(), atol=1e-6)


def test_other_content_is_refused_by_the_name_of_its_cache(
    world: World, caches: tuple[Path, Path], tmp_path: Path
) -> None:
    samples = [
        dataclasses.replace(s, turns=(*s.turns[:-1], dataclasses.replace(s.turns[-1], text="No.")))
        for s in tiny_samples(24)
    ]
    write_set(samples, tmp_path / "set")
    world.run(tmp_path / "cache", data=tmp_path / "set")
    parts = [open_cache(caches[0]), open_cache(tmp_path / "cache")]
    both = SeveralCaches(parts, Mixture((0.5, 0.5), by_samples=True))
    with pytest.raises(CacheError, match=r"sample 'tiny-0003' \(response\): its text or images in cache '.*cache' are"):
        both.sequences(parts[0].rows(*_keys(world, "tiny-0003")))


def _keys(world: World, key: str) -> tuple[object, str]:
    samples = SampleSet.open(world.samples)
    return samples.index.column("key").take([samples.row_of(key)]), "response"


def test_sources_read_from_their_own_cache_in_any_order(world: World, caches: tuple[Path, Path]) -> None:
    parts = [open_cache(path) for path in caches]
    part_N = np.arange(24) % 2
    one = SeveralCaches(parts, BySource({"a": 0, "b": 1}, part_N, (0, len(parts[0]))))
    samples = SampleSet.open(world.samples)
    keys = samples.index.column("key")
    rows = one.rows(keys, "response", samples.shard_rows)
    order = np.array([5, 4, 11, 0, 3])
    found = one.targets(rows[order])
    start = 0
    for place in order.tolist():
        key = keys[place].as_py()
        expected = parts[part_N[place]].targets([(key, "response")])
        mine = found[slice(start, start + len(expected))]
        assert torch.equal(mine.target_ids_N, expected.target_ids_N)
        width = expected.topk_ids_NK.shape[1]
        assert torch.equal(mine.topk_log_probs_NK[:, :width], expected.topk_log_probs_NK)
        assert one.owner(int(rows[place])) is parts[part_N[place]]
        start += len(expected)
    assert start == len(found)
    assert [rows.tolist() for _, rows in one.assigned(np.arange(4))] == [[0, 2], [1, 3]]
