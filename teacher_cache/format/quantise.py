"""Numbers of a record as small integers, each with a known error. FORMAT.md, section 4, is the specification.

A log-prob −x is stored as the integer nearest to f(x) = 2s·(1 − e^(−x/2)) + x/d. The first term is uniform in √p, which
makes the error of a likely id small (the KL that a rounding costs is 2·Δ(√p)²); the second distinguishes unlikely ids.
A tail's share r is stored as the integer nearest to (2L/π)·arcsin √r: uniform in the same sense for two outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint16]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_LARGEST = int(np.iinfo(np.uint16).max)
_TABLE = 8192


@dataclass(frozen=True)
class Precision:
    """How finely numbers are rounded: `s` and `d` of log-probs, `L` of tail shares, entropy steps per nat."""

    probability_levels: int
    log_prob_step: float
    share_levels: int
    entropy_steps: int


COARSE = Precision(probability_levels=96, log_prob_step=0.5, share_levels=255, entropy_steps=16)
FINE = Precision(probability_levels=256, log_prob_step=0.125, share_levels=1023, entropy_steps=64)


def encode_log_probs(log_probs: Floats, precision: Precision) -> Codes:
    """Round log-probs ≤ 0 to codes, rising as the log-prob falls; −∞ and values out of range get the last code."""
    x = np.maximum(-log_probs.astype(np.float64), 0.0)
    return np.minimum(np.rint(_companded(x, precision)), _LARGEST).astype(np.uint16)


def decode_log_probs(codes: NDArray[Any], precision: Precision) -> Floats:
    """Decode log-probs. |error| ≤ ½ / f′(x), f′ taken at the less likely of the two."""
    table = log_prob_table(precision)
    if not len(codes) or codes.max() < _TABLE:
        return table.take(codes)
    return _inverse(codes.astype(np.float64), precision).astype(np.float32)


def log_prob_bound(log_probs: Floats, precision: Precision) -> Doubles:
    """The largest error of `decode_log_probs` at each log-prob."""
    x = -log_probs.astype(np.float64) + 0.5 * precision.log_prob_step
    return 0.5 / (precision.probability_levels * np.exp(-x / 2) + 1 / precision.log_prob_step)


@cache
def log_prob_table(precision: Precision) -> Floats:
    """The log-probs of the codes 0, 1, …"""
    return _inverse(np.arange(_TABLE, dtype=np.float64), precision).astype(np.float32)


def encode_shares(shares: Doubles, precision: Precision) -> Codes:
    """Round shares of a tail to codes: 0 only for an empty tail, at most L − 1 (the top-k part keeps some mass)."""
    levels = precision.share_levels
    codes = np.rint(np.arcsin(np.sqrt(np.clip(shares, 0.0, 1.0))) * (2 * levels / np.pi))
    return np.where(shares == 0.0, 0, np.clip(codes, 1, levels - 1)).astype(np.uint16)


def decode_shares(codes: Codes, precision: Precision) -> Doubles:
    """Decode shares; |error of arcsin √share| ≤ π/4L, or 3π/4L for the smallest and largest codes."""
    return np.sin(codes.astype(np.float64) * (np.pi / (2 * precision.share_levels))) ** 2


def encode_entropy(entropy_N: Floats, precision: Precision) -> Codes:
    """Round an entropy in nats to steps."""
    return np.minimum(np.rint(entropy_N.astype(np.float64) * precision.entropy_steps), _LARGEST).astype(np.uint16)


def decode_entropy(codes_N: Codes, precision: Precision) -> Floats:
    """Decode entropies; |error| ≤ half a step."""
    return codes_N.astype(np.float32) / np.float32(precision.entropy_steps)


def _companded(x: Doubles, precision: Precision) -> Doubles:
    return 2 * precision.probability_levels * -np.expm1(-x / 2) + x / precision.log_prob_step


def _inverse(codes: Doubles, precision: Precision) -> Doubles:
    """Solve f(x) = code. f is concave and increasing, so Newton's method from 0 never overshoots."""
    x = np.zeros_like(codes)
    for _ in range(60):
        slope = precision.probability_levels * np.exp(-x / 2) + 1 / precision.log_prob_step
        x += (codes - _companded(x, precision)) / slope
    return -x
