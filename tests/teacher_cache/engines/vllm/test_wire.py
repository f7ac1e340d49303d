"""Orders and answers come off the wire as they went in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.engines.make_records import make_records
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.engines.vllm.wire import NOTHING, RecordRequest, pack, unpack
from teacher_cache.format.record import Records, RecordSettings

SETTINGS = RecordSettings(0.9, 6, 4, 20.0, (2.0, 4.0), (1, 3), 0.001)


def _records(rows: int, settings: RecordSettings) -> Records:
    logits_NV = torch.randn(rows, 50, generator=torch.Generator().manual_seed(rows)) * 3
    uniforms_N = torch.from_numpy(sequence_uniforms(0, "k", "response", rows))
    return make_records(logits_NV, torch.arange(rows) - 1, uniforms_N, settings)[0]


@pytest.mark.parametrize("states", [None, 0, 3])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("temperatures", [(), (2.0, 4.0)])
def test_an_answer_comes_back_bit_by_bit(rows: int, states: int | None, temperatures: tuple[float, ...]) -> None:
    records = _records(rows, dataclasses.replace(SETTINGS, temperatures=temperatures))
    finite_N = np.arange(rows) % 3 != 1
    states_MD = None if states is None else np.random.default_rng(0).normal(size=(states, 5)).astype(np.float32)
    packed = torch.from_numpy(pack(records, finite_N, states_MD))
    assert packed.dtype == torch.int32
    answer = unpack(packed.numpy())
    assert answer is not None
    for field in dataclasses.fields(Records):
        before, after = getattr(records, field.name), getattr(answer.records, field.name)
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        assert np.array_equal(before.view(np.int32), after.view(np.int32)), field.name  # NaN and -0 included
    assert np.array_equal(answer.finite_N, finite_N)
    if states_MD is None:
        assert answer.states_MD is None
    else:
        assert answer.states_MD is not None
        assert np.array_equal(answer.states_MD, states_MD)


def test_nothing_is_no_answer_and_an_answer_without_rows_is_one() -> None:
    assert unpack(NOTHING) is None
    empty = unpack(pack(_records(0, SETTINGS), np.zeros(0, np.bool_)))
    assert empty is not None
    assert len(empty.records) == 0


@pytest.mark.parametrize("states_M", [None, np.array([0, 2]), np.zeros(0, np.int64)])
def test_an_order_survives_the_way_to_another_process(states_M: np.ndarray | None) -> None:
    order = RecordRequest(
        rows_N=np.array([4, 5, 9]),
        targets_N=np.array([7, -1, 2**31]),
        key="sample-1",
        role="chosen",
        seed=3,
        vocab_size=151_646,
        settings=SETTINGS,
        states_M=states_M,
    )
    found = RecordRequest.from_arguments(_carried(order.to_arguments()))
    for field in dataclasses.fields(RecordRequest):
        assert np.array_equal(getattr(order, field.name), getattr(found, field.name)), field.name
    assert found.settings == SETTINGS


def _carried(value: Any) -> Any:
    """What msgpack makes of plain values: tuples become lists."""
    if isinstance(value, dict):
        return {str(key): _carried(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_carried(item) for item in value]
    assert value is None or isinstance(value, (str, bytes, int, float)), type(value)
    return value
