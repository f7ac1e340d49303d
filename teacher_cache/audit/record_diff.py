"""Differences between two records of the same positions.

Shape suffixes: N positions, P of them with a target, H top-k ids of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import NO_TARGET
from teacher_cache.audit.error_bounds import record_bounds
from teacher_cache.format.quantise import Precision
from teacher_cache.format.record import Records
from teacher_cache.format.top_k_codes import starts

Doubles = NDArray[np.float64]
FIGURES = ("target log-prob", "top-k log-probs", "tail mass", "entropy")


@dataclass(frozen=True)
class Differences:
    """Absolute differences by figure (see `FIGURES`), the encoding's largest error for each value, and where the most
    likely ids are equal, [N]."""

    values: dict[str, Doubles]
    bounds: dict[str, Doubles]
    same_first_N: NDArray[np.bool_]


@dataclass(frozen=True)
class RecordDifference:
    """Statistics of some differences; zeros if there are none."""

    count: int
    max: float
    mean: float
    p99: float


def compare(captured: Records, other: Records, precision: Precision | None) -> Differences:
    """Compare captured records with others that have the same targets, such as a cache's.

    Where probabilities are nearly equal, the top-k ids may differ: only shared ids are compared, and all
    others count as tail mass. `precision`: that of the encoding of `other`; None: exact.
    """
    assert np.array_equal(captured.target_ids_N, other.target_ids_N)
    own, others = _keys(captured), _keys(other)
    _, mine, theirs = np.intersect1d(own, others, assume_unique=True, return_indices=True)
    bounds = record_bounds(captured, precision)
    target_N = captured.target_ids_N != NO_TARGET
    inside_N = np.isin(_target_keys(captured), others)
    return Differences(
        values={
            "target log-prob": _gap(captured.target_log_probs_N, other.target_log_probs_N)[target_N],
            "top-k log-probs": _gap(captured.topk_log_probs_H[mine], other.topk_log_probs_H[theirs]),
            "tail mass": np.abs(_outside(captured, mine) - _outside(other, theirs)),
            "entropy": _gap(captured.entropy_N, other.entropy_N),
        },
        bounds={
            "target log-prob": (bounds.outside_N + np.where(inside_N, bounds.shift_N, 0.0))[target_N],
            "top-k log-probs": bounds.topk_H[mine],
            "tail mass": bounds.tail_N,
            "entropy": bounds.entropy_N,
        },
        same_first_N=_firsts(captured) == _firsts(other),
    )


def join(parts: Sequence[Differences]) -> Differences:
    """Concatenate several comparisons."""
    return Differences(
        {name: np.concatenate([np.zeros(0), *(part.values[name] for part in parts)]) for name in FIGURES},
        {name: np.concatenate([np.zeros(0), *(part.bounds[name] for part in parts)]) for name in FIGURES},
        np.concatenate([np.zeros(0, np.bool_), *(part.same_first_N for part in parts)]),
    )


def measure(values: Doubles) -> RecordDifference:
    """Largest, mean and 99th percentile."""
    if not len(values):
        return RecordDifference(0, 0.0, 0.0, 0.0)
    return RecordDifference(len(values), float(values.max()), float(values.mean()), float(np.quantile(values, 0.99)))


def beyond(values: Doubles, bounds: Doubles) -> Doubles:
    """The part of differences that exceeds their bounds."""
    return np.maximum(values - bounds, 0.0)


def _keys(records: Records) -> NDArray[np.int64]:
    """A unique number for each (position, top-k id)."""
    return (np.repeat(np.arange(len(records), dtype=np.int64), records.topk_counts_N) << 32) + records.topk_ids_H


def _target_keys(records: Records) -> NDArray[np.int64]:
    return (np.arange(len(records), dtype=np.int64) << 32) + records.target_ids_N


def _outside(records: Records, shared: NDArray[np.int64]) -> Doubles:
    """The mass outside the shared top-k ids: the tail's, and that of the other top-k ids."""
    probs_H = np.exp(records.topk_log_probs_H.astype(np.float64))
    probs_H[shared] = 0.0
    owner_H = np.repeat(np.arange(len(records)), records.topk_counts_N)
    others_N = np.bincount(owner_H, weights=probs_H, minlength=len(records))
    return np.exp(records.tail_log_mass_N.astype(np.float64)) + others_N


def _firsts(records: Records) -> NDArray[np.int32]:
    return records.topk_ids_H[starts(records.topk_counts_N)]


def _gap(left: NDArray[np.float32], right: NDArray[np.float32]) -> Doubles:
    return np.abs(left.astype(np.float64) - right.astype(np.float64))
