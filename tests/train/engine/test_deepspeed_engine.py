"""The engine accumulates the gradients of many micro-batches in float32 when it trains in bfloat16."""

from __future__ import annotations

import json

import pytest
from torch.nn import functional

from tests.processes import in_two_processes
from tests.train.engine import accumulation_driver

STAGES = [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


@pytest.mark.parametrize(("zero_stage", "offload"), STAGES)
def test_bfloat16_gradients_accumulate_in_float32(
    zero_stage: int, offload: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Summing in bfloat16 would give an error of 1 percent."""
    linear = functional.linear
    step, norm = accumulation_driver.errors(zero_stage, offload=offload)
    assert step < 1e-6
    assert norm < 1e-6
    assert capsys.readouterr().out == ""  # standard output is reserved for the command
    assert functional.linear is linear  # ZeRO-3 replaces it with one that torch.compile cannot handle


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "offload"), [(1, False), (2, False), (2, True), (3, False)])
def test_they_do_so_in_two_processes(zero_stage: int, offload: bool) -> None:
    """ZeRO 2 and 3 exchange each micro-batch's gradient in bfloat16: its rounding averages out and does not accumulate.

    No gloo thread survives: one that frees a tensor while the interpreter exits would abort the process.
    """
    printed = in_two_processes(accumulation_driver.__file__, zero_stage, int(offload)).splitlines()
    errors = [json.loads(line) for line in printed if line.startswith("[")]
    assert len(errors) == 1
    assert max(errors[0]) < (1e-6 if zero_stage == 1 else 1e-3)
    assert [line for line in printed if not line.startswith("[")] == ["0", "0"]
