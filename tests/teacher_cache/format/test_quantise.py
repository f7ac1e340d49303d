"""Quantised numbers: every error within the stated bound, order preserved, end points exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.format.quantise import (
    COARSE,
    FINE,
    Precision,
    decode_entropy,
    decode_log_probs,
    decode_shares,
    encode_entropy,
    encode_log_probs,
    encode_shares,
    log_prob_bound,
)

BOTH = pytest.mark.parametrize("precision", [COARSE, FINE], ids=["coarse", "fine"])


@BOTH
def test_log_probs_keep_their_bound_from_certain_to_hopeless(precision: Precision) -> None:
    log_probs = -np.concatenate([[0.0], np.geomspace(1e-6, 900.0, 20_000)]).astype(np.float32)
    back = decode_log_probs(encode_log_probs(log_probs, precision), precision)
    assert np.all(np.abs(back - log_probs) <= log_prob_bound(np.minimum(log_probs, back), precision) + 1e-4)
    assert np.all(np.diff(back) <= 0)
    assert back[0] == 0.0


@BOTH
def test_the_bound_is_as_the_specification_says(precision: Precision) -> None:
    """Half of 1 / (s + 1/d) at p = 1, half a step d far below; it is attained, so no larger than necessary."""
    s, d = precision.probability_levels, precision.log_prob_step
    near = log_prob_bound(np.zeros(1, np.float32), precision)[0]
    far = log_prob_bound(np.full(1, -60.0, np.float32), precision)[0]
    assert 0.5 / (s + 1 / d) <= near <= 0.7 / (s + 1 / d)
    assert far == pytest.approx(d / 2, rel=1e-6)
    log_probs = -np.linspace(50, 60, 4001).astype(np.float32)
    assert np.abs(decode_log_probs(encode_log_probs(log_probs, precision), precision) - log_probs).max() > 0.98 * far


@BOTH
def test_log_probs_beyond_the_last_code_stay_there(precision: Precision) -> None:
    codes = encode_log_probs(np.array([-np.inf, -1e9], np.float32), precision)
    assert codes.tolist() == [65535, 65535]
    assert np.all(decode_log_probs(codes, precision) < -8000)


@BOTH
@given(st.floats(1e-300, 1.0))
def test_shares_keep_their_bound(precision: Precision, share: float) -> None:
    code = encode_shares(np.array([share]), precision)
    assert 1 <= code[0] < precision.share_levels
    back = float(decode_shares(code, precision)[0])
    steps = 3 if code[0] in (1, precision.share_levels - 1) else 1
    assert (
        abs(np.arcsin(np.sqrt(back)) - np.arcsin(np.sqrt(share))) <= steps * np.pi / precision.share_levels / 4 + 1e-9
    )


@BOTH
def test_no_tail_is_no_tail(precision: Precision) -> None:
    assert encode_shares(np.array([0.0, 1e-30]), precision).tolist() == [0, 1]
    assert decode_shares(np.array([0], np.uint16), precision)[0] == 0.0


@BOTH
def test_entropy_keeps_half_a_step(precision: Precision) -> None:
    entropy = np.random.default_rng(0).uniform(0, 12, 1000).astype(np.float32)
    back = decode_entropy(encode_entropy(entropy, precision), precision)
    assert np.abs(back - entropy).max() <= 0.5 / precision.entropy_steps + 1e-6
