"""The role `mismatched`: what is captured, and that sets without it are unaffected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError, DataError
from teacher_cache.capture_setup import prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.inspection.export import export_cache
from teacher_cache.plan.estimate import make_plan
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.write.merge import merge_caches
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_samples
from tests.train.reference import Reader

MISMATCHED = "capture.mismatched=true"


@pytest.fixture(scope="module")
def captured(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of seven pairs in three roles, with reference log-probs."""
    output = tmp_path_factory.mktemp("mismatched") / "cache"
    summary = world.run(output, MISMATCHED, "capture.preset=reference", "capture.precision=exact", data=world.pairs)
    assert (summary.sequences, summary.rejected) == (21, 0)
    return output


def test_every_role_has_the_teachers_log_probs_of_its_own_tokens(world: World, captured: Path) -> None:
    """Against the model itself, sample by sample; the cache is verified byte by byte."""
    cache = open_cache(captured)
    assert cache.roles == ("chosen", "mismatched", "rejected")
    reader = Reader(world.teacher, world.pairs)
    samples = SampleSet.open(world.pairs).with_mismatched()
    for sample in map(samples.read, range(7)):
        for role in sample.roles:
            with torch.no_grad():
                expected_N = reader.answer(sample, role).target_log_probs_N
            records = cache.records([(sample.key, role)])
            assert np.allclose(records.target_log_probs_N, expected_N, atol=1e-4)
            assert cache.sequence(sample.key, role).sum_log_prob == pytest.approx(float(expected_N.sum()), abs=1e-3)
            assert (records.topk_counts_N == 1).all()
            assert not len(records.tail_ids_D)
    assert verify_cache(captured).ok


def test_the_other_roles_and_the_fingerprint_are_those_of_a_cache_without_it(world: World, tmp_path: Path) -> None:
    """A cache's description of its capture names the pairing if there is one, and is otherwise unchanged."""
    with_it = world.run(tmp_path / "with", MISMATCHED, "batch_size=1", data=world.pairs)
    without = world.run(tmp_path / "without", "batch_size=1", data=world.pairs)
    assert with_it.positions > without.positions
    ours, theirs = open_cache(tmp_path / "with"), open_cache(tmp_path / "without")
    items = [(key, role) for key in sorted(theirs.keys("chosen")) for role in theirs.roles]
    for name, values in vars(theirs.records(items)).items():
        if name != "tail_ids_D":  # stored in no fixed order
            assert np.array_equal(getattr(ours.records(items), name), values), name
    assert ours.fingerprint["capture"].pop("mismatched") == "next in the ring of SHA-256"
    assert ours.fingerprint == theirs.fingerprint
    with pytest.raises(CacheError, match=r"capture.mismatched: was unset, now next in the ring"):
        world.run(tmp_path / "without", MISMATCHED, data=world.pairs)


def test_a_plan_counts_the_third_role(world: World, tmp_path: Path) -> None:
    arguments = world.arguments(tmp_path / "c", MISMATCHED, "capture.preset=reference", data=world.pairs)
    plan = make_plan(load_config(CacheTeacherConfig, (), arguments), samples=7, seconds=5)
    done = world.run(tmp_path / "c", MISMATCHED, "capture.preset=reference", data=world.pairs)
    assert (plan.sequences, plan.positions) == (21, done.positions)
    assert plan.presets["reference"] == min(plan.presets.values())


def test_caches_of_two_sets_are_merged_with_their_pairs(world: World, captured: Path, tmp_path: Path) -> None:
    others = [sample for sample in tiny_samples(12, seed=3, preference=True) if sample.key > "pair-0006"]
    write_set(others, tmp_path / "others")
    settings = (MISMATCHED, "capture.preset=reference", "capture.precision=exact")
    world.run(tmp_path / "second", *settings, data=tmp_path / "others")
    merge_caches([open_cache(captured), open_cache(tmp_path / "second")], str(tmp_path / "all"))
    merged = open_cache(tmp_path / "all")
    assert len(merged.keys("mismatched")) == 12
    for part in (open_cache(captured), open_cache(tmp_path / "second")):
        for key in part.keys("mismatched"):
            assert merged.sequence(key, "mismatched") == part.sequence(key, "mismatched")
    assert verify_cache(tmp_path / "all").ok


def test_every_role_is_exported(world: World, captured: Path, tmp_path: Path) -> None:
    cache = open_cache(captured)
    assert export_cache(cache, tmp_path / "table.parquet", layout="table").sequences == 21
    settings: dict[str, Any] = {"layout": "axolotl", "data": world.pairs, "tokenizer": world.teacher}
    texts = sum(not sample.images for sample in map(SampleSet.open(world.pairs).read, range(7)))
    assert export_cache(cache, tmp_path / "axolotl.parquet", **settings).sequences == 3 * texts


def test_sets_that_cannot_be_paired_are_refused(world: World, tmp_path: Path) -> None:
    def prepare(data: Path) -> None:
        prepare_capture(
            **load_config(CacheTeacherConfig, (), world.arguments(tmp_path / "c", MISMATCHED, data=data)).setup_values
        )

    with pytest.raises(ConfigError, match=r"capture.mismatched: set .* holds no preference samples"):
        prepare(world.samples)
    write_set(tiny_samples(1, preference=True), tmp_path / "one")
    with pytest.raises(DataError, match="1 preference sample"):
        prepare(tmp_path / "one")


def test_reference_keeps_what_is_asked_for_besides(world: World, tmp_path: Path) -> None:
    """The preset has no temperatures and no forced tokens of its own; those requested are kept."""
    arguments = world.arguments(tmp_path / "c", "capture.preset=reference")
    plain = prepare_capture(**load_config(CacheTeacherConfig, (), arguments).setup_values).fingerprint["capture"]
    assert (plain["head_max"], plain["draws_max"], plain["temperatures"], plain["forced_ids"]) == (1, 0, [], [])
    more = ("capture.temperatures=[2.0]", 'capture.forced_tokens=["<|im_end|>"]', "capture.top_k=4")
    named = prepare_capture(**load_config(CacheTeacherConfig, (), [*arguments, *more]).setup_values).fingerprint[
        "capture"
    ]
    assert (named["head_max"], named["temperatures"], len(named["forced_ids"])) == (4, [2.0], 1)
    assert json.loads(json.dumps(named)) == named
