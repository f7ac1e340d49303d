"""The settings of `cache-teacher run`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llavamod_offline.errors import ConfigError

_SLICE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class CaptureConfig:
    """What a record keeps of each distribution; see `record.RecordSettings` and FORMAT.md.

    `forced_tokens`: tokens always recorded, by their text (each a single token, such as `<|im_end|>` or ` yes`).
    `log_probs`: type of the head's log-probs, float16 or float32. `seed`: of the tail's draws.
    """

    head_mass: float = 0.97
    head_max: int = 48
    draws_max: int = 24
    draws_per_mass: float = 100.0
    temperatures: list[float] = field(default_factory=lambda: [1.5, 2.0, 4.0])
    forced_tokens: list[str] = field(default_factory=list)
    log_probs: str = "float16"
    positions: str = "response"
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("capture.log_probs", self.log_probs, ("float16", "float32"))
        _choice("capture.positions", self.positions, ("response",))


@dataclass(frozen=True)
class CacheConfig:
    """One capture: which set, by which teacher, into which cache.

    `slice: i/n` captures shards i, i + n, i + 2n … (i from 0), for job arrays that share one output.
    `dtype: auto` is float32 on a CPU and bfloat16 on a GPU. `workers` threads prepare pictures.
    """

    data: str = "???"
    teacher: str = "???"
    output: str = "???"
    template: str = "qwen"
    image_aspect: str = "pad"
    max_length: int = 2048
    batch_size: int = 16
    dtype: str = "auto"
    device: str = "auto"
    workers: int = 4
    slice: str = "0/1"
    capture: CaptureConfig = field(default_factory=CaptureConfig)

    def __post_init__(self) -> None:
        _choice("image_aspect", self.image_aspect, ("pad", "square"))
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for name in ("max_length", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} is {getattr(self, name)}, must be at least 1")
        part, parts = self.part
        if part >= parts:
            raise ConfigError(f"config: slice '{self.slice}': the first number must be less than the second")

    @property
    def part(self) -> tuple[int, int]:
        """`slice` as numbers."""
        match = _SLICE.fullmatch(self.slice)
        if not match:
            raise ConfigError(f"config: slice '{self.slice}': expected i/n, such as 0/4")
        return int(match[1]), int(match[2])


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"config: {name} is '{value}', must be one of {', '.join(choices)}")
