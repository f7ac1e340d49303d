"""Bounds on the difference between decoded and captured records: the errors stated in FORMAT.md, sections 4.1 to 4.4.

Shape suffixes: N positions, H top-k ids of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.quantise import Precision, encode_shares, log_prob_bound
from teacher_cache.format.record import Records
from teacher_cache.format.top_k_codes import starts

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """The largest error of each number: log-probs (of targets outside the top-k part as well) and entropy in nats."""

    topk_H: Doubles
    outside_N: Doubles
    shift_N: Doubles
    tail_N: Doubles
    entropy_N: Doubles


def record_bounds(captured: Records, precision: Precision | None) -> Bounds:
    """Bound what encoding and decoding does to records; zeros for `exact` (None).

    Restoring the mass (4.3) shifts the log-probs of all top-k ids of a position by at most `shift_N`, which `topk_H`
    includes.
    """
    nothing_N = np.zeros(len(captured))
    if precision is None or not len(captured):
        return Bounds(np.zeros(len(captured.topk_ids_H)), nothing_N, nothing_N, nothing_N, nothing_N)
    tail_N = np.exp(captured.tail_log_mass_N.astype(np.float64))
    low_N, high_N = _share_range(tail_N, precision)
    own_H = log_prob_bound(captured.topk_log_probs_H, precision)
    probs_H = np.exp(captured.topk_log_probs_H.astype(np.float64))
    begin_N = starts(captured.topk_counts_N)
    raised_N = np.add.reduceat(probs_H * np.exp(own_H), begin_N) / np.add.reduceat(probs_H, begin_N)
    mass_N = np.maximum(np.abs(np.log1p(-low_N) - np.log1p(-tail_N)), np.abs(np.log1p(-high_N) - np.log1p(-tail_N)))
    shift_N = np.log(raised_N) + mass_N
    return Bounds(
        topk_H=own_H + np.repeat(shift_N, captured.topk_counts_N),
        outside_N=log_prob_bound(captured.target_log_probs_N, precision),
        shift_N=shift_N,
        tail_N=np.maximum(high_N - tail_N, tail_N - low_N),
        entropy_N=np.full(len(captured), 0.5 / precision.entropy_steps),
    )


def _share_range(shares_N: Doubles, precision: Precision) -> tuple[Doubles, Doubles]:
    """The smallest and the largest value that each share may decode to."""
    levels = precision.share_levels
    codes_N = encode_shares(shares_N, precision)
    ends_N = (codes_N == 1) | (codes_N == levels - 1)
    error_N = np.where(codes_N == 0, 0.0, np.where(ends_N, 3.0, 1.0) * np.pi / (4 * levels))
    angles_N = np.arcsin(np.sqrt(np.clip(shares_N, 0.0, 1.0)))
    low_N = np.maximum(angles_N - error_N, 0.0)
    high_N = np.clip(angles_N + error_N, low_N, np.pi / 2 * (1 - 1e-9))  # the top-k part keeps some mass
    return np.sin(low_N) ** 2, np.sin(high_N) ** 2
