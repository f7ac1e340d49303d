"""The settings of `cache-teacher run`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace

from llavamod_offline.data.tokenise import Positions
from llavamod_offline.errors import ConfigError
from teacher_cache.codec import HiddenKind, HiddenPositions, PrecisionName
from teacher_cache.presets import PRESETS, Preset

_SLICE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class CaptureConfig:
    """What a record keeps of each distribution; see `record.RecordSettings` and FORMAT.md.

    `preset`: compact, standard or exhaustive (the whole vocabulary); each setting that is not null changes it.
    `forced_tokens`: tokens always recorded, by their text (each a single token, such as `<|im_end|>` or ` yes`); null:
    the template's end of a turn, yes, no and the letters A to D, as far as they are single tokens.
    `precision`: coarse, fine or exact (float32). `positions`: response (those that predict supervised tokens), or all
    that are not padding, image patches too. `seed`: of the tail's draws. `hidden`: keep the teacher's last hidden
    states, as float16 or int8, at all recorded positions or at those of image patches (`hidden_positions`).
    """

    preset: str = "standard"
    head_mass: float | None = None
    head_min_prob: float | None = None
    head_max: int | None = None
    draws_max: int | None = None
    draws_per_mass: float | None = None
    precision: PrecisionName | None = None
    temperatures: list[float] = field(default_factory=lambda: [1.5, 2.0, 4.0])
    forced_tokens: list[str] | None = None
    positions: Positions = "response"
    hidden: HiddenKind | None = None
    hidden_positions: HiddenPositions = "recorded"
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("capture.preset", self.preset, tuple(PRESETS))
        if self.hidden_positions == "image" and self.positions != "all":
            raise ConfigError("config: capture.hidden_positions is 'image', which needs capture.positions=all")

    @property
    def resolved(self) -> Preset:
        """The preset with the settings that change it."""
        own = {item.name: getattr(self, item.name) for item in fields(Preset)}
        return replace(PRESETS[self.preset], **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class EngineConfig:
    """What runs the teacher. `kind`: hf (Hugging Face transformers)."""

    kind: str = "hf"

    def __post_init__(self) -> None:
        _choice("engine.kind", self.kind, ("hf",))


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
    engine: EngineConfig = field(default_factory=EngineConfig)
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
