"""The engine accumulates the gradients of many micro-batches in float32 when it trains in bfloat16."""

from __future__ import annotations

import json

import pytest

from tests.processes import in_two_processes
from tests.train.engine import accumulation_driver

STAGES = [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


@pytest.mark.parametrize(("zero_stage", "offload"), STAGES)
def test_bfloat16_gradients_accumulate_in_float32(
    zero_stage: int, offload: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Summing in bfloat16 would give an error of 1 percent."""
    step, norm = accumulation_driver.errors(zero_stage, offload=offload)
    assert step < 1e-6
    assert norm < 1e-6
    assert capsys.readouterr().out == ""  # standard output is the command's


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "offload"), [(1, False), (2, False), (2, True), (3, False)])
def test_they_do_so_in_two_processes(zero_stage: int, offload: bool) -> None:
    """ZeRO 2 and 3 exchange each micro-batch's gradient in bfloat16: its rounding averages out, and does not add up."""
    for error in json.loads(in_two_processes(accumulation_driver.__file__, zero_stage, int(offload))):
        assert error < (1e-6 if zero_stage == 1 else 1e-3)
