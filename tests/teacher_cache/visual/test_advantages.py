"""Codes of visual advantages, and the weights derived from them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.visual.advantages import (
    CODES,
    NOT_MEASURED,
    count_codes,
    decode_advantages,
    encode_advantages,
    position_weights,
)


@given(st.lists(st.floats(-40, 40), min_size=1))
def test_advantages_come_back_within_a_sixteenth_of_a_nat(values: list[float]) -> None:
    values_N = np.array(values)
    codes_N = encode_advantages(values_N)
    assert (codes_N != NOT_MEASURED).all()
    assert np.abs(decode_advantages(codes_N) - np.clip(values_N, -127 / 8, 127 / 8)).max() <= 1 / 16


def test_what_is_infinite_is_as_far_as_codes_go() -> None:
    assert decode_advantages(encode_advantages(np.array([np.inf, -np.inf]))).tolist() == [127 / 8, -127 / 8]
    assert np.isnan(decode_advantages(np.array([NOT_MEASURED], np.uint8))).all()


@given(st.lists(st.integers(0, CODES - 1), min_size=1), st.sampled_from([0.0, 0.3, 2.0, 50.0]))
def test_weights_are_bounded_and_have_mean_one(codes: list[int], strength: float) -> None:
    """Against the definition, position by position; positions not measured have weight 1."""
    codes_N = np.array(codes, np.uint8)
    weights_N = position_weights(codes_N, count_codes(codes_N), strength)
    gains = [1 - np.exp(-max((code - 128) / 8, 0)) for code in codes if code != NOT_MEASURED]
    mean = sum(gains) / max(len(gains), 1)
    expected = [(1 + strength * gain) / (1 + strength * mean) for gain in gains]
    measured_N = codes_N != NOT_MEASURED
    assert np.allclose(weights_N[measured_N], expected, rtol=1e-5)
    assert (weights_N[~measured_N] == 1).all()
    assert (weights_N >= 1 / (1 + strength) - 1e-6).all()
    assert (weights_N <= 1 + strength + 1e-5).all()
    if measured_N.any():
        assert abs(float(weights_N[measured_N].mean()) - 1) < 1e-4
