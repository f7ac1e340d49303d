"""Whether a claim about two rows holds: paired over seeds, by an exact randomisation test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

import numpy as np

LEVEL = 0.05
_EXACT, _DRAWS = 16, 2**16


@dataclass(frozen=True)
class PairedTest:
    """The mean paired `difference` of two rows over `seeds`, and how likely one as large is by chance alone.

    `p`: for the sign that the claim wants; for `not lower`, the sign that it rules out; for `same`, either sign.
    `holds`: None with too few seeds to reach `LEVEL`. `verdict`: the same in words; a claim that something is not lower
    can only be refuted or not, since a large p-value is no evidence for it. All are NaN, None and `undefined` if a
    value is NaN.
    """

    difference: float
    p: float
    seeds: int
    holds: bool | None
    verdict: str


_VERDICTS = {True: "holds", False: "does not hold", None: "too few seeds"}
_NOT_LOWER = {True: "not refuted", False: "refuted", None: "too few seeds"}


def compare(
    row: Sequence[float], than: Sequence[float], wants: Literal["higher", "lower", "same", "not lower"]
) -> PairedTest:
    """Compare two rows' values, seed by seed.

    `higher` and `lower` hold at p < `LEVEL`. `same` holds if the mean difference is within the second row's spread over
    seeds, `not lower` unless the first is lower at p < `LEVEL`.
    """
    differences = [mine - other for mine, other in zip(row, than, strict=True)]
    seeds, difference = len(differences), mean(differences)
    if not math.isfinite(difference):
        return PairedTest(math.nan, math.nan, seeds, None, "undefined")
    if wants == "same":
        holds = None if 2.0**-seeds >= LEVEL else abs(difference) <= stdev(than)
        return PairedTest(difference, sign_flip(differences, two_sided=True), seeds, holds, _VERDICTS[holds])
    p = sign_flip(differences if wants == "higher" else [-value for value in differences])
    holds = None if 2.0**-seeds >= LEVEL else p >= LEVEL if wants == "not lower" else p < LEVEL
    return PairedTest(difference, p, seeds, holds, (_NOT_LOWER if wants == "not lower" else _VERDICTS)[holds])


def sign_flip(differences: Sequence[float], *, two_sided: bool = False) -> float:
    """The share of sign assignments whose sum is at least as large as the observed one.

    Fisher's randomisation test of paired differences, with a smallest p-value of 1/2ⁿ: exact up to `_EXACT` of them,
    beyond that by random assignments.
    """
    if len(differences) <= _EXACT:
        sums = np.zeros(1)
        for value in differences:
            sums = np.concatenate([sums + value, sums - value])
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_DRAWS, len(differences)))
        sums = np.append(signs @ np.array(differences), sum(differences))
    slack = 1e-12 * max((abs(value) for value in differences), default=0.0)
    if two_sided:
        return float(np.mean(np.abs(sums) >= abs(sum(differences)) - slack))
    return float(np.mean(sums >= sum(differences) - slack))
