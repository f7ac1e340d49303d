"""The settings of `cache-teacher run` and `generate`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.data.sample import KEY_PATTERN
from llavamod_offline.errors import ConfigError
from llavamod_offline.vllm.settings import VllmSettings
from teacher_cache.engines.registry import ENGINES
from teacher_cache.format.schema import HiddenKind, HiddenPositions, PrecisionName

if TYPE_CHECKING:
    from teacher_cache.capture_setup import SetupValues

_SLICE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Preset:
    """What a record keeps and how precisely (see `record.RecordSettings`); `tests.benchmarks.codec` measures presets.

    `top_k` None: the whole vocabulary. `forced_tokens` None: the defaults (see `CaptureConfig`).
    """

    top_p: float
    min_prob: float
    top_k: int | None
    tail_samples_max: int
    tail_samples_per_mass: float
    precision: PrecisionName
    temperatures: Sequence[float] = (1.5, 2.0, 4.0)
    forced_tokens: Sequence[str] | None = None


PRESETS: dict[str, Preset] = {
    "compact": Preset(1.0, 0.006, 16, 12, 60.0, "coarse"),
    "standard": Preset(1.0, 0.0007, 128, 16, 100.0, "fine"),
    "exhaustive": Preset(1.0, 0.0, None, 0, 1.0, "exact"),
    # The log-probs of the targets, for preference losses; each record needs at least one top-k id.
    "reference": Preset(1.0, 0.0, 1, 0, 1.0, "fine", temperatures=(), forced_tokens=()),
}


@dataclass(frozen=True)
class CaptureConfig:
    """What a record keeps of each distribution; see `record.RecordSettings` and FORMAT.md.

    `preset`: compact, standard, exhaustive (the whole vocabulary) or reference (log-probs of the actual tokens only);
    settings that are not null override it. `temperatures` null: 1.5, 2 and 4; none with reference.
    `forced_tokens`: tokens always recorded, each the text of a single token such as `<|im_end|>` or ` yes`; null: the
    template's end of turn, yes, no and A to D where these are single tokens; none with reference.
    `precision`: coarse, fine or exact (float32). `positions`: response (those that predict supervised tokens) or all
    except padding, including image patches. `seed`: of the tail samples. `hidden`: keep the teacher's last hidden
    states, as float16 or int8, at all recorded positions or only at image patches (`hidden_positions`).
    `mismatched`: also capture each preference sample with another sample's response (for `kto`).
    """

    preset: str = "standard"
    top_p: float | None = None
    min_prob: float | None = None
    top_k: int | None = None
    tail_samples_max: int | None = None
    tail_samples_per_mass: float | None = None
    precision: PrecisionName | None = None
    temperatures: list[float] | None = None
    forced_tokens: list[str] | None = None
    positions: Positions = "response"
    hidden: HiddenKind | None = None
    hidden_positions: HiddenPositions = "recorded"
    mismatched: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("capture.preset", self.preset, tuple(PRESETS))
        if self.hidden_positions == "image" and self.positions != "all":
            raise ConfigError("config: capture.hidden_positions is 'image', which needs capture.positions=all")

    @property
    def resolved(self) -> Preset:
        """The preset with its overrides."""
        own = {item.name: getattr(self, item.name) for item in fields(Preset)}
        return replace(PRESETS[self.preset], **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class TeacherEngineConfig:
    """What runs the teacher. `kind`: hf (Hugging Face transformers), vllm (records are made in vLLM's workers), or
    vllm_logprobs (any model that vLLM runs, but only the top-k and the targets' log-probs, and slower); `vllm` holds
    the settings of both.

    For hf only: `attention`: sdpa, eager or flash_attention_2. `device_map` auto spreads the layers of a model over
    several GPUs when one is too small (needs accelerate; ignores `device`). `compile`: run torch.compile on the
    decoder, which takes minutes and pays off on long runs.

    `ray`: capture shards in Ray workers, each with its own engine: on the cluster at RAY_ADDRESS, which must see the
    same files, otherwise on this machine. `ray_workers` null: as many as fit. Each gets `cpus_per_worker` CPUs and
    `gpus_per_worker` GPUs; null: none on a CPU, else one, or vLLM's `tensor_parallel`.
    """

    kind: str = "hf"
    attention: str = "sdpa"
    device_map: str | None = None
    compile: bool = False
    ray: bool = False
    ray_workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: int = 1
    vllm: VllmSettings = field(default_factory=VllmSettings)

    def __post_init__(self) -> None:
        _choice("engine.kind", self.kind, tuple(ENGINES))
        _choice("engine.attention", self.attention, ("sdpa", "eager", "flash_attention_2"))
        if self.device_map is not None:
            _choice("engine.device_map", self.device_map, ("auto",))
        for name, least in (("ray_workers", 1), ("gpus_per_worker", 0), ("cpus_per_worker", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"config: engine.{name} is {value:g}, must be at least {least}")


@dataclass(frozen=True)
class GenerateConfig:
    """How the teacher writes answers (`cache-teacher generate` only). `turns`: replace the last answer of each
    conversation, or all of them in order, each given the new ones before it.

    `temperature` 0 is greedy; otherwise tokens are sampled from the top-p (nucleus) set, with random numbers that
    depend on `seed` and the sample's key alone. An answer of more than `max_new_tokens` tokens is rejected.
    `key_suffix` is appended to the keys of the new set.
    """

    turns: Literal["last", "all"] = "last"
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    key_suffix: str = "-generated"

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"config: generate.temperature is {self.temperature:g}, must be 0 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"config: generate.top_p is {self.top_p:g}, must lie above 0 and be at most 1")
        if self.max_new_tokens < 1:
            raise ConfigError(f"config: generate.max_new_tokens is {self.max_new_tokens}, must be at least 1")
        if self.key_suffix and not KEY_PATTERN.fullmatch(self.key_suffix):
            raise ConfigError(f"config: generate.key_suffix is '{self.key_suffix}': only letters, digits, '-' and '_'")


@dataclass(frozen=True)
class CacheTeacherConfig:
    """One capture: a set, a teacher, and the cache to write.

    `template`: qwen (LLaVA-MoD's own), chatml, or tokenizer: the chat template in the teacher's folder.
    `slice: i/n` captures shards i, i + n, i + 2n … (i from 0), for job arrays that share one output.
    `image_aspect`: pad (to a square), square (LLaVA's name for the processor's own resizing), or auto: pad for LLaVA,
    the processor's own resizing for families that take images of any shape.
    `dtype: auto` is float32 on a CPU and bfloat16 on a GPU. `workers` threads prepare images.
    `max_rejected`: stop when a larger share of sequences is rejected; null: never.
    `output_set`: the set that `generate` writes; its answers are then captured instead of those of `data`.
    """

    data: str = "???"
    teacher: str = "???"
    output: str = "???"
    template: str = "qwen"
    image_aspect: str = "auto"
    max_length: int = 2048
    batch_size: int = 16
    dtype: str = "auto"
    device: str = "auto"
    workers: int = 4
    slice: str = "0/1"
    max_rejected: float | None = None
    engine: TeacherEngineConfig = field(default_factory=TeacherEngineConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    output_set: str | None = None
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        _choice("image_aspect", self.image_aspect, ("auto", "pad", "square"))
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for name in ("max_length", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} is {getattr(self, name)}, must be at least 1")
        if self.max_rejected is not None and not 0.0 <= self.max_rejected <= 1.0:
            raise ConfigError(f"config: max_rejected is {self.max_rejected:g}, must lie in 0 … 1")
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

    @property
    def setup_values(self) -> SetupValues:
        """What `capture_setup.prepare_capture` takes."""
        capture, engine = self.capture, self.engine
        return {
            "data": self.data,
            "teacher": self.teacher,
            "template": self.template,
            "image_aspect": self.image_aspect,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "dtype": self.dtype,
            "device": self.device,
            "keep": capture.resolved,
            "positions": capture.positions,
            "hidden": capture.hidden,
            "hidden_positions": capture.hidden_positions,
            "mismatched": capture.mismatched,
            "seed": capture.seed,
            "engine": engine.kind,
            "attention": engine.attention,
            "device_map": engine.device_map,
            "compile": engine.compile,
            "vllm": engine.vllm,
        }


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"config: {name} is '{value}', must be one of {', '.join(choices)}")
