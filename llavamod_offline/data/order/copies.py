"""How often an epoch holds each sample, by the weight of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.order.hashes import COPIES, hashes
from llavamod_offline.errors import ConfigError


@dataclass(frozen=True)
class Weights:
    """How often an epoch holds the samples of each source: `sources_N` holds indices into `weights`."""

    sources_N: NDArray[np.integer]
    weights: Sequence[float]


class Copies:
    """How many copies of each sample an epoch holds; `total`: of all. Errors: `ConfigError` for a bad weight."""

    def __init__(self, weights: Weights, seed: int) -> None:
        self._base_N = np.zeros(len(weights.sources_N), np.int32)
        self._extras: list[
            tuple[NDArray[np.int64], int]
        ] = []  # the samples of a source in the order of their turns; how many turns
        self.total = 0
        for source, weight in enumerate(weights.weights):
            if not 0 <= weight < 2**31:
                raise ConfigError(f"weight {weight:g}: must not be negative")
            members = np.flatnonzero(weights.sources_N == source)
            if not len(members) or not weight:
                continue
            wanted = max(1, floor(weight * len(members) + 0.5))
            whole, turns = divmod(wanted, len(members))
            self._base_N[members] = whole
            self.total += wanted
            if turns:
                self._extras.append((members[np.argsort(hashes(members, seed, 0, COPIES))], turns))

    def of_epoch(self, epoch: int) -> NDArray[np.int32]:
        """The number of copies of each sample in one epoch, [N]."""
        copies_N = self._base_N.copy()
        for members, turns in self._extras:
            copies_N[members[(epoch * turns + np.arange(turns)) % len(members)]] += 1
        return copies_N
