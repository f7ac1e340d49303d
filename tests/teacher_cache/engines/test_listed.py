"""Records from listed log-probs against records from full distributions, where both have the same information."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teacher_cache.engines.listed import listed_records
from teacher_cache.engines.make_records import make_records
from teacher_cache.format.record import Records, RecordSettings

ROWS, WIDTH, VOCAB = 40, 60, 50


def _dense(width: int) -> tuple[Any, Any]:
    """[N, `width`] log-probs of peaked and flat rows, and targets, some of them missing."""
    generator = torch.Generator().manual_seed(5)
    logits_NV = torch.randn(ROWS, width, generator=generator) * torch.linspace(0.5, 8, ROWS)[:, None]
    targets_N = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets_N[::7] = -1
    return logits_NV.double().log_softmax(-1).numpy(), targets_N.numpy()


def _recorded(
    log_probs_NV: Any, targets_N: Any, slots: int, settings: RecordSettings
) -> tuple[Records, NDArray[np.bool_]]:
    """Records from the `slots` most likely ids of each row."""
    ids_NK = np.argsort(-log_probs_NV, axis=1)[:, :slots]
    return listed_records(
        ids_NK,
        np.take_along_axis(log_probs_NV, ids_NK, 1),
        targets_N,
        log_probs_NV[np.arange(len(targets_N)), np.maximum(targets_N, 0)],
        settings,
        vocab_size=VOCAB,
    )


@pytest.mark.parametrize(
    "settings",
    [
        RecordSettings(1.0, 10, 0, 1.0, ()),
        RecordSettings(0.8, 10, 0, 1.0, ()),
        RecordSettings(1.0, 10, 0, 1.0, (), (), 0.01),
        RecordSettings(1.0, VOCAB, 0, 1.0, ()),
        RecordSettings(1.0, 1, 0, 1.0, ()),
    ],
)
def test_what_is_listed_is_recorded_as_from_the_whole_distribution(settings: RecordSettings) -> None:
    log_probs_NV, targets_N = _dense(VOCAB)
    uniforms_N = torch.zeros(ROWS, dtype=torch.float64)
    expected, _ = make_records(torch.from_numpy(log_probs_NV), torch.from_numpy(targets_N), uniforms_N, settings)
    found, finite_N = _recorded(log_probs_NV, targets_N, min(settings.top_k, VOCAB), settings)
    assert finite_N.all()
    assert np.array_equal(found.topk_counts_N, expected.topk_counts_N)
    assert np.array_equal(found.topk_ids_H, expected.topk_ids_H)
    assert np.allclose(found.topk_log_probs_H, expected.topk_log_probs_H, atol=1e-5)
    assert np.allclose(found.target_log_probs_N, expected.target_log_probs_N, atol=1e-5)
    assert np.array_equal(found.target_ids_N, expected.target_ids_N)
    assert np.allclose(np.exp(found.tail_log_mass_N), np.exp(expected.tail_log_mass_N), atol=1e-6)
    assert np.array_equal(np.isneginf(found.tail_log_mass_N), np.isneginf(expected.tail_log_mass_N))
    assert (found.entropy_N <= expected.entropy_N + 1e-5).all()
    if settings.top_k == VOCAB:
        assert np.allclose(found.entropy_N, expected.entropy_N, atol=1e-5)
    assert not found.tail_counts_N.any()
    assert found.log_normalisers_NS.shape == (ROWS, 0)


def test_listed_ids_beyond_the_vocabulary_leave_the_distribution() -> None:
    settings = RecordSettings(1.0, WIDTH, 0, 1.0, ())
    log_probs_NV, targets_N = _dense(WIDTH)
    uniforms_N = torch.zeros(ROWS, dtype=torch.float64)
    inside_NV = torch.from_numpy(log_probs_NV[:, :VOCAB])
    expected, _ = make_records(inside_NV, torch.from_numpy(targets_N), uniforms_N, settings)
    found, _ = _recorded(log_probs_NV, targets_N, WIDTH, settings)
    assert np.array_equal(found.topk_ids_H, expected.topk_ids_H)
    assert np.allclose(found.topk_log_probs_H, expected.topk_log_probs_H, atol=1e-5)
    assert np.allclose(found.target_log_probs_N, expected.target_log_probs_N, atol=1e-5)
    assert np.isneginf(found.tail_log_mass_N).all()


def test_equal_log_probs_stand_by_rising_id() -> None:
    settings = RecordSettings(1.0, 4, 0, 1.0, ())
    ids = np.array([[9, 2, 30, 4]])
    log_probs = np.log(np.array([[0.4, 0.2, 0.2, 0.1]]))
    found, _ = listed_records(ids[:, [0, 2, 1, 3]], log_probs, np.array([9]), log_probs[:, 0], settings, vocab_size=50)
    assert found.topk_ids_H.tolist() == [9, 2, 30, 4]
    assert found.tail_log_mass_N[0] == pytest.approx(np.log(0.1), abs=1e-6)


def test_a_row_that_is_not_finite_is_named() -> None:
    settings = RecordSettings(1.0, 10, 0, 1.0, ())
    log_probs_NV, targets_N = _dense(VOCAB)
    log_probs_NV[3] = np.nan
    found, finite_N = _recorded(log_probs_NV, targets_N, 10, settings)
    assert np.flatnonzero(~finite_N).tolist() == [3]
    assert len(found) == ROWS
