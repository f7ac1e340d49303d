"""A cache of format version 1, written once and for all: the code must always be able to read it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache

SAMPLES = Path(__file__).parent / "samples"
# Fields renamed since → their names in the sample's own description.
_FIRST_NAMES = {
    "topk_counts_N": "head_counts_N",
    "tail_counts_N": "draw_counts_N",
    "topk_ids_H": "head_ids_H",
    "tail_ids_D": "draw_ids_D",
    "topk_log_probs_H": "head_log_probs_H",
}


def test_format_version_1_is_read_as_it_was_written() -> None:
    cache = open_cache(SAMPLES / "format_1")
    said = json.loads((SAMPLES / "format_1.json").read_text())
    assert cache.digest == said["digest"]
    assert sorted(cache.keys("chosen")) == said["keys"]
    items = [(key, role) for role in cache.roles for key in said["keys"]]
    assert {f"{key} {role}": cache.sequence(key, role).sum_log_prob for key, role in items} == said["sum_log_probs"]
    records = cache.records(items)
    for name in ("target_ids_N", "topk_counts_N", "tail_counts_N", "topk_ids_H", "tail_ids_D"):
        assert getattr(records, name).tolist() == said[_FIRST_NAMES.get(name, name)], name
    for name in ("target_log_probs_N", "entropy_N", "tail_log_mass_N", "topk_log_probs_H", "log_normalisers_NS"):
        assert np.allclose(getattr(records, name), said[_FIRST_NAMES.get(name, name)], atol=2e-5), name
    hidden = cache.hidden_states([(said["keys"][0], "chosen")])
    assert float(hidden.states_MD.astype(float).sum()) == pytest.approx(said["hidden_sum"], abs=2e-3)
    profile_V = cache.tail_profile
    assert profile_V is not None
    assert profile_V.argsort(descending=True)[:3].tolist() == said["tail_profile_top"]
    assert verify_cache(SAMPLES / "format_1").ok
