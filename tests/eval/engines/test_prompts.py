"""Questions as prompts, whatever names a benchmark uses."""

from __future__ import annotations

import pytest

from eval.engines.prompts import asked_sample
from eval.example import Example


@pytest.mark.parametrize("identity", ["existence/0000.png#1", "12", "a b", "é" * 90, "x" * 500])
def test_a_question_of_any_id_is_a_sample(identity: str) -> None:
    sample = asked_sample(Example(identity, "Is it?", "yes"))
    assert sample.turns[0].text == "Is it?"
