"""The settings of `cache-teacher run` and `generate`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from llavamod_offline.config import InputPath, raise_problems
from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.data.sample import KEY_PATTERN
from llavamod_offline.vllm.settings import VllmSettings
from teacher_cache.engines.registry import EngineName
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.format.record import out_of_range
from teacher_cache.format.schema import HiddenKind, HiddenPositions, PrecisionName, WithoutImage

if TYPE_CHECKING:
    from teacher_cache.capture_setup import SetupValues

_SLICE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Preset:
    """What a record keeps and how precisely (see `record.RecordSettings`); `tests.benchmarks.codec` measures presets.

    `top_k` None: the whole vocabulary.
    """

    top_p: float
    min_prob: float
    top_k: int | None
    tail_samples_max: int
    tail_samples_per_mass: float
    precision: PrecisionName
    temperatures: Sequence[float] = ()
    forced_tokens: Sequence[str] = ()
    temperature: float = 1.0


PRESETS: dict[str, Preset] = {
    # With samples of weight 1/n, ids above 1/n to 1/2n belong in the top-k: `tests.benchmarks.readings --curve`.
    "small": Preset(1.0, 0.03, 32, 16, 16.0, "coarse"),
    "compact": Preset(1.0, 0.015, 64, 64, 64.0, "coarse"),
    "standard": Preset(1.0, 0.002, 250, 250, 250.0, "fine", temperatures=(1.5, 2.0, 4.0)),
    "exhaustive": Preset(1.0, 0.0, None, 0, 1.0, "exact", temperatures=(1.5, 2.0, 4.0)),
    # The log-probs of the targets, for preference losses; each record needs at least one top-k id.
    "reference": Preset(1.0, 0.0, 1, 0, 1.0, "fine"),
}


@dataclass(frozen=True)
class CaptureConfig:
    """What a record keeps of each distribution. Settings that are null take the preset's value."""

    preset: Literal["small", "compact", "standard", "exhaustive", "reference"] = "standard"
    """Values for the settings below: small, compact or standard (about 20, 30 or 75 bytes per record), exhaustive (the
    whole vocabulary), or reference (only the log-probs of the actual tokens, for preference training)."""
    top_p: float | None = None
    """Keep the most likely ids up to this cumulative probability, from 0 to 1; always at least one id."""
    min_prob: float | None = None
    """Keep no id whose probability is below this."""
    top_k: int | None = None
    """Keep at most this many ids."""
    tail_samples_max: int | None = None
    """Maximum number of tail samples per position."""
    tail_samples_per_mass: float | None = None
    """Tail samples per unit of tail mass."""
    precision: PrecisionName | None = None
    """Precision of the stored numbers; exact: float32."""
    temperature: float | None = None
    """Temperature at which students will be trained (loss.temperature); top-k ids and tail samples are chosen for it;
    null: 1."""
    temperatures: list[float] | None = None
    """Further temperatures at which a loss can read the tail, as one bucket, such as [1.5, 2]; null: 1.5, 2 and 4 with
    standard and exhaustive, else none."""
    forced_tokens: list[str] | None = None
    """Tokens to record at every position, however unlikely, such as [' yes', ' no'], for uses other than training."""
    positions: Positions = "response"
    """Positions to record: response (those that predict answers) or all (all except padding, image tokens included)."""
    hidden: HiddenKind | None = None
    """Data type in which to keep the teacher's last hidden states; null: do not keep them."""
    hidden_positions: HiddenPositions = "recorded"
    """Where to keep hidden states: at all recorded positions, or only at image tokens."""
    without_image: WithoutImage | None = None
    """Run the teacher a second time without the content of the images, and keep what the image adds to each answer
    token's log-prob, in one byte (for loss.visual_weight and the report). blank: replace each image by its mean colour;
    drop: remove the images from the conversation; null: no second run."""
    mismatched: bool = False
    """Also capture each preference sample with another sample's response (for loss.kind=kto)."""
    seed: int = 0
    """Seed for the tail samples."""
    attempts: int = 3
    """How many times `work` tries to capture a shard, on other workers first, before listing it as failed."""

    def problems(self) -> Iterator[str]:
        """Yield one line for each problem, naming the key to change."""
        if self.attempts < 1:
            yield f"capture.attempts is {self.attempts}: must be at least 1"
        if self.hidden_positions == "image" and self.positions != "all":
            yield "capture.hidden_positions: image needs records at image tokens: set capture.positions to all"
        keep = self.resolved
        yield from out_of_range(
            top_p=keep.top_p,
            min_prob=keep.min_prob,
            top_k=1 if keep.top_k is None else keep.top_k,
            tail_samples_max=keep.tail_samples_max,
            tail_samples_per_mass=keep.tail_samples_per_mass,
            temperatures=keep.temperatures,
            temperature=keep.temperature,
            forced=keep.forced_tokens,
        )

    @property
    def resolved(self) -> Preset:
        """The preset with its overrides."""
        own = {item.name: getattr(self, item.name) for item in fields(Preset)}
        return replace(PRESETS[self.preset], **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class TeacherEngineConfig:
    """What runs the teacher."""

    kind: EngineName = "hf"
    """hf (transformers), vllm, or, for models that vllm cannot wrap, vLLM's own log-probs (slower, and only for the
    top-k and the actual tokens), computed here (vllm_logprobs) or by a vLLM server at url (server)."""
    url: str | None = None
    """Address of the vLLM server (server only), such as http://gpu-host:8000; it must serve the teacher's checkpoint
    and, for images, be started with --enable-scale-out."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation (hf only)."""
    device_map: Literal["auto"] | None = None
    """auto (hf only): spread the layers over several GPUs if one is too small; ignores device, needs accelerate."""
    compile: bool = False
    """Run torch.compile on the decoder (hf only): takes minutes, and pays off on long runs."""
    ray: bool = False
    """Capture or generate in Ray workers: on the cluster at RAY_ADDRESS, which must see the same files, or on this
    machine."""
    ray_workers: int | None = None
    """Number of Ray workers; null: as many as fit."""
    gpus_per_worker: float | None = None
    """GPUs per Ray worker; null: none on a CPU, otherwise one, or as many as vLLM spreads the model over."""
    cpus_per_worker: int = 1
    """CPUs per Ray worker."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    server: ServerSettings = field(default_factory=ServerSettings)

    def problems(self) -> Iterator[str]:
        """Yield one line for each problem, naming the key to change."""
        for name, least in (("ray_workers", 1), ("gpus_per_worker", 0), ("cpus_per_worker", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                yield f"engine.{name} is {value:g}: must be at least {least}"
        if self.ray and self.vllm.executor == "ray":
            yield (
                "engine.vllm.executor is 'ray', with which one engine takes its GPUs from the cluster by itself: "
                "remove engine.ray, or the executor if each engine fits on one machine"
            )
        if self.kind == "server" and self.url is None:
            yield "engine.url: engine.kind=server needs the server's address, such as http://gpu-host:8000"
        if self.kind != "server" and self.url is not None:
            yield f"engine.url is for engine.kind=server, not {self.kind}: set that, or remove it"
        if self.kind == "server" and self.ray:
            yield "engine.ray: a server batches for itself, and engine.kind=server needs no workers: remove it"
        yield from self.server.problems("engine.server", self.url)


@dataclass(frozen=True)
class GenerateConfig:
    """How the teacher writes answers (`cache-teacher generate` only)."""

    turns: Literal["last", "all"] = "last"
    """Answers to replace: the last of each conversation, or all in order, each given the new ones before it."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the most likely tokens up to this cumulative probability, above 0 and at most 1."""
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens; longer ones are rejected."""
    seed: int = 0
    """Seed for sampling, which depends only on it and the sample's key."""
    key_suffix: str = "-generated"
    """Appended to the keys of the new set; may be empty."""
    answers: int = 1
    """Number of answers per prompt, each sampled with its own random numbers; their keys end in -0, -1 and so on."""
    stop: list[str] = field(default_factory=list)
    """Stop strings: an answer ends before the first of these."""
    system: str | None = None
    """System turn to add to conversations that have none, and to keep in the new set; null: none."""
    max_new_tokens_by_source: dict[str, int] = field(default_factory=dict)
    """Maximum answer length in tokens for individual sources' prompts, instead of max_new_tokens, such as {ocr: 64}."""
    round: int | None = None
    """Number of the round in which a student wrote the answers, from 1; kept in the set and in its caches."""
    capture: bool = True
    """Also capture the new set, with the model that wrote it. false: only write it, for `cache-teacher run` to capture
    with another teacher; nothing is written to output then."""

    def problems(self) -> Iterator[str]:
        """Yield one line for each problem, naming the key to change."""
        if not 0.0 <= self.temperature < float("inf"):
            yield f"generate.temperature is {self.temperature:g}: must be 0 or more"
        if not 0.0 < self.top_p <= 1.0:
            yield f"generate.top_p is {self.top_p:g}: must be above 0 and at most 1"
        limits = {f"_by_source.{source}": most for source, most in self.max_new_tokens_by_source.items()}
        for name, most in {"": self.max_new_tokens, **limits}.items():
            if most < 1:
                yield f"generate.max_new_tokens{name} is {most}: must be at least 1"
        if self.answers < 1:
            yield f"generate.answers is {self.answers}: must be at least 1"
        if self.answers > 1 and self.temperature == 0:
            yield "generate.answers: greedy answers to a prompt are all the same: set generate.temperature above 0"
        if "" in self.stop:
            yield "generate.stop: an empty text would end every answer: remove it"
        if self.system is not None and not self.system.strip():
            yield "generate.system: is empty: remove it"
        if self.round is not None and self.round < 1:
            yield f"generate.round is {self.round}: must be at least 1"
        if self.key_suffix and not KEY_PATTERN.fullmatch(self.key_suffix):
            yield f"generate.key_suffix is '{self.key_suffix}': it may have only letters, digits, '-' and '_'"

    @property
    def described(self) -> dict[str, Any]:
        """The settings for a set's manifest; those that older sets lack, only where they differ from the default."""
        content = {name: value for name, value in asdict(self).items() if name != "capture"}
        return {name: value for name, value in content.items() if name in _FIRST or value != getattr(_DEFAULT, name)}

    def limit(self, source: str) -> tuple[int, str]:
        """The most tokens of an answer to a source's prompts, and the setting that sets it."""
        if source in self.max_new_tokens_by_source:
            return self.max_new_tokens_by_source[source], f"generate.max_new_tokens_by_source.{source}"
        return self.max_new_tokens, "generate.max_new_tokens"

    def suffix(self, copy: int) -> str:
        """What is appended to the key of answer number `copy`."""
        return f"{self.key_suffix}-{copy}" if self.answers > 1 else self.key_suffix


_FIRST = ("turns", "temperature", "top_p", "max_new_tokens", "seed", "key_suffix")
_DEFAULT = GenerateConfig()


@dataclass(frozen=True)
class CacheTeacherConfig:
    """One capture: a set, a teacher, and the cache to write."""

    data: InputPath = "???"
    """The set to capture: a folder that llavamod-offline pack or index made, or its URL."""
    teacher: InputPath = "???"
    """Folder or Hub id (org/name, org/name@revision) of the teacher's checkpoint."""
    output: str = "???"
    """Folder of the cache; rerun the same command to resume."""
    template: str = "auto"
    """Prompt template: auto (taken from the teacher's chat template, or from an unfinished output), qwen (LLaVA-MoD's
    own), chatml, llava_v1, or tokenizer (the chat template, without checking images and ids)."""
    image_aspect: Literal["auto", "pad", "square"] = "auto"
    """How images are prepared: pad (padded to squares) or square (resized by the checkpoint's own processor); auto: as
    a student's folder states, pad for other LLaVAs, square for families that take images of any shape."""
    max_length: int = 2048
    """Maximum length of a sequence in tokens, image tokens included; longer ones are rejected."""
    batch_size: int = 16
    """Sequences per forward pass; halved if memory runs out."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the teacher's weights and activations; auto: float32 on a CPU, otherwise bfloat16."""
    device: str = "auto"
    """Where the teacher runs: auto (a GPU if there is one), cpu, cuda, or one GPU, such as cuda:1."""
    workers: int | None = None
    """Processes that decode and prepare images beside the teacher; 0: threads of the teacher's process; null: 4 with a
    GPU, or fewer if there are fewer cores, and 0 on a CPU, where the teacher needs the cores itself."""
    slice: str = "0/1"
    """i/n: capture or generate only shards i, i + n, i + 2n … (from 0), for job arrays that share one output."""
    max_rejected: float | None = None
    """Stop if more than this share of the sequences, from 0 to 1, is rejected; null: never."""
    engine: TeacherEngineConfig = field(default_factory=TeacherEngineConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    output_set: str | None = None
    """Folder of the set that `cache-teacher generate` writes; its answers are then captured instead of data's."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def __post_init__(self) -> None:
        raise_problems(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield one line for each problem, naming the key to change."""
        for name, least in (("max_length", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}: must be at least {least}"
        if self.max_rejected is not None and not 0.0 <= self.max_rejected <= 1.0:
            yield f"max_rejected is {self.max_rejected:g}: must be from 0 to 1"
        match = _SLICE.fullmatch(self.slice)
        if not match:
            yield f"slice is '{self.slice}': must be i/n, such as 0/4"
        elif int(match[1]) >= int(match[2]):
            yield f"slice: in '{self.slice}' the first number must be less than the second: it counts from 0"
        yield from self.capture.problems()
        yield from self.engine.problems()
        yield from self.engine.vllm.problems("engine.vllm")
        yield from self.generate.problems()

    @property
    def part(self) -> tuple[int, int]:
        """`slice` as numbers."""
        match = _SLICE.fullmatch(self.slice)
        assert match
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
            "without_image": capture.without_image,
            "mismatched": capture.mismatched,
            "seed": capture.seed,
            "engine": engine.kind,
            "attention": engine.attention,
            "device_map": engine.device_map,
            "compile": engine.compile,
            "vllm": engine.vllm,
            "url": engine.url,
            "server": engine.server,
        }
