"""The configuration of a training run, and the checks that need nothing else.

Checks that need the checkpoint, the data or the cache are in `setup.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from llavamod_offline.errors import ConfigError
from train.loss_config import LossConfig, loss_problems
from train.tracking import TrackerName

Stage = Literal["align", "mimic_dense", "mimic_sparse", "preference", "sft"]

CACHED_STAGES = ("mimic_dense", "mimic_sparse", "preference")
PARTS = ("vision", "projector", "text", "embeddings", "attention", "mlp", "experts", "router", "norms", "lm_head")


@dataclass(frozen=True)
class DataConfig:
    """The samples, by path or URL; `holdout` of them are not trained on but used to evaluate the loss.

    `too_long`: a sample of more than `max_length` tokens ends the run (error), or is skipped and listed in
    rejected.jsonl (drop). `window`: the number of shards shuffled together, 0 for all; null: all, or 16 if the set or
    the cache is remote or the cache's decoded records exceed 256 MB. `weights`: how often each source's samples occur
    in an epoch, such as {coco: 2, ocr: 0.5}, default 1; null: the set's own. `group_by_length`: batch samples of
    similar length.
    """

    set: str = "???"
    holdout: int = 0
    too_long: Literal["error", "drop"] = "error"
    window: int | None = None
    weights: dict[str, float] | None = None
    group_by_length: bool = False


@dataclass(frozen=True)
class CacheSourceConfig:
    """The teacher's cache, and what to do with samples that are `missing` from it.

    `end_of_turn: <teacher token>=<student token>` declares the one token that may differ from the student's. `allow`
    names fields of the cache's fingerprint that may differ from the student's.
    """

    path: str | None = None
    missing: Literal["error", "drop"] = "error"
    end_of_turn: str | None = None
    allow: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class UpcycleConfig:
    """Which dense layers become mixtures of experts: `sparse` (every other), `first_half`, `second_half`, `dense` (all)
    or a list of indices. `residual` keeps the dense MLP as a shared expert; `seed` initialises the routers."""

    layers: str | list[int] = "sparse"
    num_experts: int = 4
    top_k: int = 2
    residual: bool = False
    seed: int = 0


@dataclass(frozen=True)
class StudentConfig:
    """The initial student: a LLaVA checkpoint, or a vision tower and a language model with a new projector.

    `capacity_factor`: in training, an expert of a sparse student takes at most ⌈factor · top_k · tokens / num_experts⌉
    tokens of a micro-batch; null: no limit.
    """

    checkpoint: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    kind: Literal["dense", "sparse"] = "dense"
    upcycle: UpcycleConfig | None = None
    capacity_factor: float | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, a linear warm-up over `warmup_ratio` of the steps, then the schedule; `grad_clip` 0 turns clipping off."""

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: float = 1.0


@dataclass(frozen=True)
class BatchConfig:
    """Samples per optimiser step over all processes, and per forward pass of one process."""

    global_size: int = 128
    micro_size: int = 1


@dataclass(frozen=True)
class TrainEngineConfig:
    """DeepSpeed's settings. `dtype` auto: bfloat16 on a GPU, float32 elsewhere.

    `zero_stage` null: 2 for several processes or with offloading, for one process 0 in float32 and 1 in bfloat16.
    """

    zero_stage: int | None = None
    offload: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. `steps` (optimiser steps) overrides `epochs`; `save_steps` 0 saves no checkpoints,
    `eval_steps` 0 evaluates nothing. `template`: qwen (LLaVA-MoD's own), chatml, or tokenizer for the chat template in
    the student's folder. `tracker`: none (metrics.jsonl alone), tensorboard, trackio or wandb. `workers`: processes
    that make the batches; null: one per spare core, at most 8."""

    stage: Stage = "???"  # type: ignore[assignment]
    output: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheSourceConfig = field(default_factory=CacheSourceConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    template: str = "qwen"
    image_aspect: Literal["pad", "square"] = "pad"
    max_length: int = 2048
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    epochs: int = 1
    steps: int | None = None
    trainable: list[str] = field(default_factory=lambda: ["projector", "text"])
    engine: TrainEngineConfig = field(default_factory=TrainEngineConfig)
    seed: int = 0
    save_steps: int = 1000
    keep_last: int = 2
    log_steps: int = 1
    eval_steps: int = 0
    tracker: TrackerName = "none"
    workers: int | None = None

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ConfigError(problem)

    @property
    def roles(self) -> tuple[str, ...]:
        """The sample roles that the stage reads; it trains on all but `mismatched`, which is only evaluated."""
        if self.stage != "preference":
            return ("response",)
        return ("chosen", "rejected", "mismatched") if self.loss.kind == "kto" else ("chosen", "rejected")

    @property
    def needs_cache(self) -> bool:
        """Whether the stage learns from a teacher's cache."""
        return self.stage in CACHED_STAGES


def _problems(config: TrainConfig) -> Iterable[str]:
    """Yield one line for each problem, naming the key to change."""
    yield from _number_problems(config)
    yield from loss_problems(config.loss, config.stage)
    yield from _stage_problems(config)
    yield from _student_problems(config.student)
    unknown = [part for part in config.trainable if part not in PARTS]
    if unknown or not config.trainable:
        named = f"'{unknown[0]}' is unknown" if unknown else "is empty"
        yield f"trainable: {named}: choose from {', '.join(PARTS)}"


def _stage_problems(config: TrainConfig) -> Iterable[str]:
    if config.needs_cache and config.cache.path is None:
        yield f"cache.path: stage {config.stage} learns from a teacher's cache: set cache.path to one"
    if not config.needs_cache and config.cache.path is not None:
        yield f"cache.path: stage {config.stage} uses no teacher: remove cache.path"
    if config.stage == "mimic_dense" and config.student.kind != "dense":
        yield "student.kind: stage mimic_dense trains a dense student: set it to dense, or stage to mimic_sparse"
    if config.stage == "mimic_sparse" and config.student.kind != "sparse":
        yield "student.kind: stage mimic_sparse trains a sparse student: set it to sparse, or stage to mimic_dense"
    if config.loss.router_aux_coef and config.student.kind != "sparse":
        yield "loss.router_aux_coef: a dense student has no router: set it to 0, or student.kind to sparse"
    if "router" in config.trainable and config.student.kind != "sparse":
        yield "trainable: a dense student has no router: remove 'router', or set student.kind to sparse"


def _student_problems(student: StudentConfig) -> Iterable[str]:
    parts = (student.vision_tower, student.language_model)
    if student.checkpoint is None and None in parts:
        missing = "vision_tower" if student.vision_tower is None else "language_model"
        both = "" if parts == (None, None) else f" student.{missing} is not set"
        yield "student: set student.checkpoint, or both student.vision_tower and student.language_model" + (
            f":{both}" if both else ""
        )
    if student.checkpoint is not None and parts != (None, None):
        named = "vision_tower" if student.vision_tower is not None else "language_model"
        yield f"student.{named}: a student starts from student.checkpoint or from parts, not both: remove one"
    if student.capacity_factor is not None and student.kind != "sparse":
        yield "student.capacity_factor: a dense student has no experts: set it to null, or student.kind to sparse"
    if student.capacity_factor is not None and not student.capacity_factor > 0:
        yield f"student.capacity_factor: {student.capacity_factor:g} must be above 0"
    if student.upcycle is None:
        return
    if student.kind != "sparse":
        yield "student.upcycle: upcycling makes a sparse student: set student.kind to sparse, or upcycle to null"
    if student.upcycle.num_experts < 2:
        yield f"student.upcycle.num_experts: {student.upcycle.num_experts} is too few: use 2 or more"
    if not 1 <= student.upcycle.top_k <= student.upcycle.num_experts:
        yield (
            f"student.upcycle.top_k: {student.upcycle.top_k} is not between 1 and "
            f"student.upcycle.num_experts {student.upcycle.num_experts}"
        )


def _number_problems(config: TrainConfig) -> Iterable[str]:
    optim = config.optim
    positive = {
        "max_length": config.max_length,
        "batch.global_size": config.batch.global_size,
        "batch.micro_size": config.batch.micro_size,
        "epochs": config.epochs,
        "steps": 1 if config.steps is None else config.steps,
        "keep_last": config.keep_last,
        "log_steps": config.log_steps,
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
    }
    not_negative = {
        "save_steps": config.save_steps,
        "eval_steps": config.eval_steps,
        "workers": config.workers or 0,
        "data.holdout": config.data.holdout,
        "data.window": config.data.window or 0,
        **{f"data.weights.{source}": weight for source, weight in (config.data.weights or {}).items()},
        "optim.weight_decay": optim.weight_decay,
        "optim.grad_clip": optim.grad_clip,
    }
    yield from (f"{key}: {value:g} must be above 0" for key, value in positive.items() if not value > 0)
    yield from (f"{key}: {value:g} must not be negative" for key, value in not_negative.items() if not value >= 0)
    if not 0 <= optim.warmup_ratio <= 1:
        yield f"optim.warmup_ratio: {optim.warmup_ratio:g} is not between 0 and 1"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas: {list(optim.betas)} must lie in [0, 1)"
    if config.engine.zero_stage not in (None, 0, 1, 2, 3):
        yield f"engine.zero_stage: {config.engine.zero_stage} is not 0, 1, 2 or 3"
    if config.engine.offload and config.engine.zero_stage not in (None, 2, 3):
        yield "engine.offload: offloading needs ZeRO: set engine.zero_stage to 2 or 3"
    if config.batch.global_size % config.batch.micro_size:
        yield (
            f"batch.micro_size: {config.batch.micro_size} does not divide batch.global_size {config.batch.global_size}"
        )
    if config.eval_steps and not config.data.holdout:
        yield "eval_steps: needs held-out samples: set data.holdout to their number"
