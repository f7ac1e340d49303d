"""The settings of `train-student measure`, named as those of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llavamod_offline.config import InputPath, raise_problems
from llavamod_offline.data.image_aspect import ImageAspect
from llavamod_offline.errors import ConfigError
from train.config.train import CacheSourceConfig


@dataclass(frozen=True)
class MeasuredStudentConfig:
    """The student."""

    checkpoint: InputPath = "???"
    """A folder, or the Hub id of a local snapshot."""


@dataclass(frozen=True)
class UnseenDataConfig:
    """The samples; choose ones that the student was not trained on."""

    set: InputPath = "???"
    """A folder that llavamod-offline pack or index made, or its URL."""
    too_long: Literal["error", "drop"] = "error"
    """Samples of more than max_length tokens: end the command, or leave them out."""


@dataclass(frozen=True)
class MeasureConfig:
    """One measurement: a student, and a set that it has not seen."""

    student: MeasuredStudentConfig = field(default_factory=MeasuredStudentConfig)
    data: UnseenDataConfig = field(default_factory=UnseenDataConfig)
    cache: CacheSourceConfig = field(default_factory=CacheSourceConfig)
    template: str = "auto"
    """Prompt template, as in training."""
    image_aspect: ImageAspect = "auto"
    """How a LLaVA's images are made square, as in training; auto: pad. Other families: auto."""
    max_length: int = 2048
    """Maximum length of a sample in tokens, image tokens included."""
    batch_size: int = 16
    """Samples per forward pass."""
    device: str = "auto"
    """Where the student runs: auto (a GPU if there is one), cpu, cuda, or one GPU, such as cuda:1."""
    workers: int | None = None
    """Processes that prepare batches; 0: none; null: one per spare core, at most 8."""

    def __post_init__(self) -> None:
        if self.cache.other_tokenizer is not None:
            raise ConfigError(
                "cache.other_tokenizer: the distance from a teacher is measured only with its tokenizer: remove it, "
                "and set cache.path to null, to measure the student on the set's answers"
            )
        least = {"max_length": 1, "batch_size": 1, "workers": 0}
        raise_problems(
            f"{name} is {value}: must be at least {low}"
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and value < low
        )
