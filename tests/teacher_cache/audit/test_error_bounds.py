"""The encoding error bounds: every decoded number lies within them, and they are no wider than necessary."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.encode.tokenize import NO_TARGET
from teacher_cache.audit.error_bounds import record_bounds
from teacher_cache.audit.record_diff import compare
from teacher_cache.engines.make_records import make_records
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.format.columns import ColumnFile, write_columns
from teacher_cache.format.record import Records, RecordSettings, concatenate_records
from teacher_cache.format.schema import Codec, PrecisionName

ROUNDING = 1e-5  # of float32, to which log-probs are decoded


def records_of(rows: int, width: int, seed: int, scale: float, kept: RecordSettings) -> Records:
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    targets = torch.arange(rows) % width
    targets[::5] = NO_TARGET
    return make_records(logits, targets, torch.from_numpy(sequence_uniforms(seed, "k", "response", rows)), kept)[0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.sampled_from([3, 300, 9_000]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    top_p=st.sampled_from([0.0, 0.9, 1.0]),
    top_k=st.sampled_from([1, 16, 9_000]),
    forced=st.sampled_from([(), (2, 0)]),
    precision=st.sampled_from(get_args(PrecisionName)),
    seed=st.integers(0, 999),
)
def test_decoded_records_lie_within_the_bounds(
    rows: int,
    width: int,
    scale: float,
    top_p: float,
    top_k: int,
    forced: tuple[int, ...],
    precision: PrecisionName,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kept = RecordSettings(top_p, min(top_k, width), 4, 20.0, (), forced)
    records = records_of(rows, width, seed, scale, kept)
    codec = Codec(width, (), precision, kept.top_k + len(forced), 4, forced)
    folder = tmp_path_factory.mktemp("c") / "columns.zarr"
    write_columns(folder, records, codec)
    file = ColumnFile(folder)
    found = compare(records, concatenate_records(file.records(0, file.blocks)), codec.numbers)
    assert found.same_first_N.all()
    for name, values in found.values.items():
        assert values.shape == found.bounds[name].shape, name
        assert np.all(values <= found.bounds[name] * (1 + 1e-6) + ROUNDING), name
        if precision == "exact":
            assert not found.bounds[name].any()
            assert not values.any()
    assert len(found.values["top-k log-probs"]) == len(records.topk_ids_H)


@pytest.mark.parametrize("precision", ["coarse", "fine"])
def test_the_bounds_are_not_much_wider_than_what_happens(precision: PrecisionName) -> None:
    kept = RecordSettings(0.99, 16, 4, 20.0, ())
    numbers = Codec(300, (), precision, 16, 4).numbers
    assert numbers is not None
    bounds = record_bounds(records_of(500, 300, 1, 3.0, kept), numbers)
    # Near p = 1 and far below it: as FORMAT.md says, plus the shift of a whole head by its own errors.
    assert bounds.topk_H.min() < 0.03
    assert bounds.topk_H.max() < 2 * numbers.log_prob_step
    assert bounds.entropy_N.max() == 0.5 / numbers.entropy_steps
    assert bounds.tail_N.max() < np.pi / (4 * numbers.share_levels)
