"""Differences of records: by hand, where heads differ, and with targets missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from teacher_cache.audit.record_diff import FIGURES, RecordDifference, beyond, compare, join, measure
from teacher_cache.format.record import Records


def by_hand(heads: list[dict[int, float]], targets: list[tuple[int, float]], entropy: list[float]) -> Records:
    """Records with heads given as id → probability; the tails have the rest."""
    ids = [number for head in heads for number in head]
    probs = np.array([p for head in heads for p in head.values()], np.float64)
    tails = np.array([1 - sum(head.values()) for head in heads])
    none = np.zeros(len(heads), np.int32)
    return Records(
        target_ids_N=np.array([number for number, _ in targets], np.int32),
        target_log_probs_N=np.array([value for _, value in targets], np.float32),
        entropy_N=np.array(entropy, np.float32),
        tail_log_mass_N=np.log(tails).astype(np.float32),
        log_normalisers_NS=np.zeros((len(heads), 0), np.float32),
        topk_counts_N=np.array([len(head) for head in heads], np.int32),
        tail_counts_N=none,
        topk_ids_H=np.array(ids, np.int32),
        topk_log_probs_H=np.log(probs).astype(np.float32),
        tail_ids_D=none[:0],
    )


def test_heads_of_different_ids_are_compared_where_they_meet() -> None:
    """Two ids tie at 0.2: one head took id 7, the other id 8; the mass outside their common ids is the same."""
    one = by_hand([{3: 0.5, 7: 0.2}, {1: 0.9}], [(3, -0.7), (-1, 0.0)], [1.0, 0.4])
    two = by_hand([{3: 0.4, 8: 0.2}, {2: 0.6, 1: 0.3}], [(3, -0.9), (-1, 0.0)], [1.5, 0.4])
    found = compare(one, two, None)
    assert found.values["target log-prob"] == pytest.approx([0.2])
    assert found.values["top-k log-probs"] == pytest.approx([np.log(0.5 / 0.4), np.log(0.9 / 0.3)])
    assert found.values["tail mass"] == pytest.approx([0.1, 0.6])
    assert found.values["entropy"] == pytest.approx([0.5, 0.0])
    assert found.same_first_N.tolist() == [True, False]
    assert not any(found.bounds[name].any() for name in FIGURES)


def test_the_same_records_do_not_differ_and_parts_are_joined() -> None:
    one = by_hand([{3: 0.5, 7: 0.2}], [(3, -0.7)], [1.0])
    other = dataclasses.replace(one, entropy_N=one.entropy_N + 2)
    both = join([compare(one, one, None), compare(one, other, None)])
    assert both.values["entropy"].tolist() == [0.0, 2.0]
    assert len(both.values["top-k log-probs"]) == 4
    measured = measure(both.values["entropy"])
    assert (measured.count, measured.max, measured.mean) == (2, 2.0, 1.0)
    assert measured.p99 == pytest.approx(1.98)
    assert measure(join([]).values["entropy"]) == RecordDifference(0, 0.0, 0.0, 0.0)
    assert beyond(np.array([1.0, 3.0]), np.array([2.0, 1.0])).tolist() == [0.0, 2.0]


def test_other_targets_are_no_difference_but_a_mistake() -> None:
    one = by_hand([{3: 0.5}], [(3, -0.7)], [1.0])
    with pytest.raises(AssertionError):
        compare(one, dataclasses.replace(one, target_ids_N=one.target_ids_N + 1), None)
