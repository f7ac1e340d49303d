"""Ready-made choices of what a record keeps and how finely. Sizes and errors: `python -m tests.benchmarks.codec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teacher_cache.codec import PrecisionName


@dataclass(frozen=True)
class Preset:
    """See `record.RecordSettings` for what the numbers do. `head_max` None: the whole vocabulary.

    `forced_tokens` None: those that go without saying (see `config.CaptureConfig`).
    """

    head_mass: float
    head_min_prob: float
    head_max: int | None
    draws_max: int
    draws_per_mass: float
    precision: PrecisionName
    temperatures: Sequence[float] = (1.5, 2.0, 4.0)
    forced_tokens: Sequence[str] | None = None


PRESETS: dict[str, Preset] = {
    "compact": Preset(1.0, 0.006, 16, 12, 60.0, "coarse"),
    "standard": Preset(1.0, 0.0007, 128, 16, 100.0, "fine"),
    "exhaustive": Preset(1.0, 0.0, None, 0, 1.0, "exact"),
    # The log-probs of the tokens that are there, for preference losses: a head has one id because each must have one.
    "reference": Preset(1.0, 0.0, 1, 0, 1.0, "fine", temperatures=(), forced_tokens=()),
}
