"""The exact paired test, and when a claim holds."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.ladder.claims import compare, sign_flip
from llavamod_offline.ladder.report import write_report
from llavamod_offline.ladder.results import difference_text, summarise

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "ladder"
VALUES = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=7)


@given(VALUES)
def test_p_is_the_share_of_signs_that_give_as_large_a_mean(differences: list[float]) -> None:
    means = [
        mean(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    at_least = sum(value >= mean(differences) - 1e-9 for value in means)
    assert sign_flip(differences) == pytest.approx(at_least / len(means))


@given(VALUES)
def test_one_of_both_directions_is_likely_and_equal_rows_prove_nothing(differences: list[float]) -> None:
    forward, backward = sign_flip(differences), sign_flip([-value for value in differences])
    assert forward + backward >= 1
    assert sign_flip(differences, two_sided=True) >= min(forward, backward)
    assert sign_flip([0.0] * len(differences)) == 1


def test_five_seeds_of_one_sign_are_just_enough() -> None:
    than = [0.5, 0.6, 0.7, 0.4, 0.5]
    better = [value + 0.1 for value in than]
    assert compare(better, than, "higher").holds is True
    assert compare(better, than, "higher").p == 1 / 32
    assert compare(better, than, "lower").holds is False
    assert compare(than, better, "lower").holds is True
    assert compare([*better[:4], 0.49], than, "higher").p == pytest.approx(2 / 32)
    assert compare([*better[:4], 0.0], than, "higher").holds is False


def test_four_seeds_can_show_nothing() -> None:
    assert compare([2.0] * 4, [1.0] * 4, "higher").holds is None
    assert compare([1.0], [1.0], "same").holds is None


def test_the_same_is_within_the_spread_of_seeds() -> None:
    than = [1.0, 1.2, 0.8, 1.1, 0.9]
    assert compare([value + 0.05 for value in than], than, "same").holds is True
    assert compare([value + 0.3 for value in than], than, "same").holds is False
    assert compare([value - 0.3 for value in than], than, "same").holds is False


def test_not_lower_is_refuted_only_if_it_is_lower_beyond_chance() -> None:
    than = [1.0, 1.2, 0.8, 1.1, 0.9]
    same, higher, lower = (
        compare([value + change for value in than], than, "not lower") for change in (0.0, 1.0, -0.1)
    )
    assert (same.holds, same.verdict) == (True, "not refuted")
    assert (higher.holds, higher.verdict) == (True, "not refuted")
    assert (lower.holds, lower.verdict) == (False, "refuted")
    assert compare(than[:2], than[:2], "not lower").verdict == "too few seeds"


def test_an_undefined_value_supports_nothing() -> None:
    found = compare([0.9, math.nan, 0.9, 0.9, 0.9], [0.2] * 5, "lower")
    assert (found.holds, found.verdict, math.isnan(found.p)) == (None, "undefined", True)


def test_a_rate_that_is_undefined_for_one_seed_has_no_figures(tmp_path: Path) -> None:
    """As the share of absent objects where a student names none."""
    seeds = {n: json.loads((COMMITTED / f"seed-{n}" / "results.json").read_text()) for n in range(1, 6)}
    seeds[2]["runs"]["kto_pair"]["columns"]["response_hallucination"] = None
    summary = summarise(seeds)
    claim = json.loads(json.dumps(summary, allow_nan=False))["claims"]["preference_below_start"]
    assert (claim["holds"], claim["verdict"], claim["p"]) == (None, "undefined", None)
    assert summary["claims"]["kd_over_sft"]["verdict"] == "holds"
    write_report(tmp_path / "report.html", summary, seeds[1]["examples"])
    page = (tmp_path / "report.html").read_text()
    assert ">undefined</b>" in page
    assert "nan" not in page.partition("Descriptions")[0].lower().replace("distillation", "")


def test_many_seeds_are_tested_by_random_signs() -> None:
    """Two to the power of 64 sign assignments could not be listed."""
    rng = np.random.default_rng(1)
    assert sign_flip([1.0] * 64) < 1e-4
    assert 0.05 < sign_flip(rng.normal(0.0, 1.0, 64).tolist()) < 0.95
    assert 0.0 < sign_flip([1.0] * 17) < 1e-3


@pytest.mark.parametrize(("difference", "text"), [(0.0187, "+0.0187"), (-1.9e-5, "-1.9e-05"), (0.0, "+0.0000")])
def test_a_small_difference_does_not_read_as_zero(difference: float, text: str) -> None:
    assert difference_text(difference) == text
