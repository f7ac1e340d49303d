"""Records: what a cache keeps of the teacher's distribution at each recorded position, in columns.

Shape suffixes: N positions, S temperatures; H top-k ids and D tail samples of all positions, concatenated (as in a CSR
matrix).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.config import raise_problems
from llavamod_offline.errors import ConfigError

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

# The names in a fingerprint of format version 1, and the fields of `RecordSettings` that they stand for.
STORED_SETTINGS = {
    "head_mass": "top_p",
    "head_max": "top_k",
    "draws_max": "tail_samples_max",
    "draws_per_mass": "tail_samples_per_mass",
    "temperatures": "temperatures",
    "forced_ids": "forced_ids",
    "head_min_prob": "min_prob",
}


def out_of_range(
    *,
    top_p: float,
    min_prob: float,
    top_k: int,
    tail_samples_max: int,
    tail_samples_per_mass: float,
    temperatures: Sequence[float],
    temperature: float,
    forced: Sequence[object],
) -> Iterator[str]:
    """Yield one line for each setting of a record that is out of range, naming its key."""
    checks = (
        (0.0 <= top_p <= 1.0, f"top_p is {top_p:g}: must be from 0 to 1"),
        (0.0 <= min_prob < 1.0, f"min_prob is {min_prob:g}: must be at least 0 and below 1"),
        (top_k >= 1, f"top_k is {top_k}: must be at least 1"),
        (0 <= tail_samples_max <= 65535, f"tail_samples_max is {tail_samples_max}: must be from 0 to 65535"),
        (tail_samples_per_mass > 0, f"tail_samples_per_mass is {tail_samples_per_mass:g}: must be above 0"),
        (temperature > 0, f"temperature is {temperature:g}: must be above 0"),
        (
            all(t > 0 and t != 1.0 for t in temperatures),
            f"temperatures is {[*temperatures]}: all must be above 0, and not 1, which is always included",
        ),
        (len(set(temperatures)) == len(temperatures), f"temperatures is {[*temperatures]}: list each once"),
        (len(forced) <= 255, f"forced_tokens has {len(forced)}: must be at most 255"),
        (len(set(forced)) == len(forced), f"forced_tokens is {[*forced]}: list each once"),
    )
    return (f"capture.{problem}" for fine, problem in checks if not fine)


@dataclass(frozen=True)
class RecordSettings:
    """What a record holds: the top-k part, samples of the tail, and normalisers.

    Top-k: the most likely ids until their mass reaches `top_p`, their number `top_k`, or the next one's probability is
    below `min_prob`; at least one, and all of `forced_ids`. Tail: `tail_samples_per_mass` samples per unit of its mass,
    1 to `tail_samples_max` (0 for none). `temperatures`: those T ≠ 1 whose log Σ p^(1/T) is kept. `temperature`: the T
    at which students will learn: probabilities in these rules, and the samples, are those of p^(1/T) / Σ p^(1/T).

    `top_p=1.0, top_k=V` keeps every id (exhaustive). Errors: `ConfigError` naming the value out of range.
    """

    top_p: float
    top_k: int
    tail_samples_max: int
    tail_samples_per_mass: float
    temperatures: tuple[float, ...]
    forced_ids: tuple[int, ...] = ()
    min_prob: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 1.0 and self.temperature not in self.temperatures:
            raise ConfigError(f"capture.temperature is {self.temperature:g}: must be 1 or one of capture.temperatures")
        raise_problems(
            out_of_range(
                top_p=self.top_p,
                min_prob=self.min_prob,
                top_k=self.top_k,
                tail_samples_max=self.tail_samples_max,
                tail_samples_per_mass=self.tail_samples_per_mass,
                temperatures=self.temperatures,
                temperature=self.temperature,
                forced=self.forced_ids,
            )
        )

    def stored(self) -> dict[str, Any]:
        """The settings as JSON values under the names that format version 1 stores in a fingerprint."""
        values = {name: getattr(self, own) for name, own in STORED_SETTINGS.items()}
        if self.temperature != 1.0:  # caches of earlier versions lack it
            values["temperature"] = self.temperature
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_stored(cls, capture: Mapping[str, Any]) -> RecordSettings:
        """The settings that a fingerprint's `capture` section holds."""
        values: dict[str, Any] = {own: capture[name] for name, own in STORED_SETTINGS.items()}
        for name in ("temperatures", "forced_ids"):
            values[name] = tuple(values[name])
        return cls(**values, temperature=float(capture.get("temperature", 1.0)))


@dataclass(frozen=True)
class Records:
    """The records of N positions, in columns; log-probs are natural, float32, at T = 1.

    `target_ids_N` is −1 for a position without target, whose `target_log_probs_N` is 0.

    `topk_counts_N`: how many of `topk_ids_H` and `topk_log_probs_H` belong to each position, most likely first
    (ties by increasing id), then the forced ids that are not among those, in the order of `forced_ids`.
    `tail_counts_N` likewise for `tail_ids_D`, in any order; an id sampled twice occurs twice. `tail_log_mass_N` is −inf
    if the tail is empty. `log_normalisers_NS`: log Σ_v p(v)^(1/T).
    """

    target_ids_N: Ints
    target_log_probs_N: Floats
    entropy_N: Floats
    tail_log_mass_N: Floats
    log_normalisers_NS: Floats
    topk_counts_N: Ints
    tail_counts_N: Ints
    topk_ids_H: Ints
    topk_log_probs_H: Floats
    tail_ids_D: Ints

    def __len__(self) -> int:
        return len(self.target_ids_N)

    def split(self, lengths: Sequence[int]) -> list[Records]:
        """Split into consecutive pieces with the given numbers of positions, as views."""
        edges_N = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        edges_H = np.concatenate([[0], np.cumsum(self.topk_counts_N)])[edges_N]
        edges_D = np.concatenate([[0], np.cumsum(self.tail_counts_N)])[edges_N]
        edges = {"H": edges_H, "D": edges_D}
        pieces = []
        for piece in range(len(lengths)):
            columns = {}
            for field in fields(self):
                edge = edges.get(field.name[-1], edges_N)
                columns[field.name] = getattr(self, field.name)[edge[piece] : edge[piece + 1]]
            pieces.append(Records(**columns))
        return pieces


def concatenate_records(parts: Sequence[Records], temperatures: int = 0) -> Records:
    """Concatenate records in order; no parts give no positions, with `temperatures` normalisers."""
    if not parts:
        i, f = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return Records(i, f, f, f, np.zeros((0, temperatures), np.float32), i, i, i, f, i)
    return Records(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Records)})
