"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llavamod_offline.config import InputPath, raise_problems
from llavamod_offline.data.image_aspect import ImageAspect
from train.config.lora import LoraConfig
from train.config.loss import LossConfig
from train.config.problems import config_problems
from train.tracking import TrackerName

Stage = Literal["align", "mimic_dense", "mimic_sparse", "preference", "sft"]

CACHED_STAGES = ("mimic_dense", "mimic_sparse", "preference")


@dataclass(frozen=True)
class DataConfig:
    """The samples."""

    set: InputPath = "???"
    """The set to train on: a folder that llavamod-offline pack or index made, or its URL."""
    holdout: int = 0
    """Samples to hold out of training, on which the loss is evaluated every eval_steps."""
    too_long: Literal["error", "drop"] = "error"
    """A sample of more than max_length tokens: end the run before its first step, or skip it and list it in
    rejected.jsonl."""
    window: int | None = None
    """Shards that are shuffled together, 0 for all; null: all, or 16 if the set or the cache is remote or the cache's
    decoded records exceed 256 MB."""
    weights: dict[str, float] | None = None
    """How often each source's samples occur in an epoch, such as {coco: 2, ocr: 0.5}; others 1. null: the set's own."""
    group_by_length: bool = False
    """Make batches of samples of similar length."""
    group_by_modality: bool = False
    """Make batches of samples with images, and batches of samples without; with group_by_length, both."""


@dataclass(frozen=True)
class CacheSourceConfig:
    """The teacher's cache, for mimic_dense, mimic_sparse and preference."""

    path: InputPath | list[InputPath] | dict[str, InputPath] | None = None
    """The cache of data.set: a folder that cache-teacher run made, or its URL. Of several teachers: a list, such as
    [caches/a, caches/b], to learn from their mixture; or a cache for each source of the set, such as
    {ocr: caches/a, "*": caches/b}, where "*" stands for all other sources."""
    weights: list[float] | None = None
    """Weights of a list of caches in their mixture, such as [2, 1]; null: all the same."""
    missing: Literal["error", "drop"] = "error"
    """A sample without a record in the cache: end the run, or leave it out."""
    end_of_turn: str | None = None
    """The one token that may differ, as TEACHER_TOKEN=STUDENT_TOKEN, such as <|im_end|>=<|endoftext|>."""
    other_tokenizer: Literal["align"] | None = None
    """A student with another tokenizer than the teacher's: align both by the bytes of their tokens (mimic stages; see
    train/README.md); null: end the run."""
    allow: list[str] = field(default_factory=list)
    """Fields of the cache's fingerprint that may differ from the student's."""


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense checkpoint becomes a mixture of experts."""

    layers: str | list[int] = "sparse"
    """The layers: sparse (every other), first_half, second_half, dense (all), or a list such as [0, 2]. Text models of
    Mistral, Llama, OLMo 2, Granite and Qwen3.5 need dense."""
    num_experts: int | list[int] = 4
    """Experts of each such layer, at least 2; a list has one number for each, all the same."""
    top_k: int = 2
    """Experts that each token is routed to. With 1, the second most likely expert also runs in training, with weight 0,
    to teach the router."""
    residual: bool = False
    """Keep the dense MLP as a shared expert."""
    seed: int = 0
    """Seed of the routers' initial weights and of expert_noise."""
    expert_noise: float = 0.0
    """Noise added to each expert's copy of the MLP, in units of the weights' standard deviation, such as 0.02. The
    student is then no longer exactly the dense one at the start."""
    router_noise: float = 0.0
    """Noise added to the routers' logits during this training, in units of their standard deviation, such as 0.3."""


@dataclass(frozen=True)
class StudentConfig:
    """The initial student: a checkpoint, or a vision tower and a language model that become a LLaVA."""

    checkpoint: InputPath | None = None
    """Folder or Hub id (org/name) of an image-text model of any family, such as the student of the stage before."""
    vision_tower: InputPath | None = None
    """Folder or Hub id of a vision tower, with language_model and instead of checkpoint."""
    language_model: InputPath | None = None
    """Folder or Hub id of a language model, with vision_tower and instead of checkpoint."""
    projector: InputPath | None = None
    """A pretrained projector for a student of parts: LLaVA's mm_projector.bin (its pretrain_mm_mlp_adapter), the folder
    of one, or a safetensors file of a LLaVA; null: a new one."""
    projector_type: str | None = None
    """Projector of a student of parts: linear or mlp2x_gelu; null: that of the file, or mlp2x_gelu."""
    vision_feature_layer: int | list[int] | None = None
    """Layer of the tower whose hidden states a student of parts sees, or several, side by side; null: -2."""
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    """Image tokens of a student of parts: default (patches, without the class token), full (with it); null: patches."""
    kind: Literal["dense", "sparse"] = "dense"
    """Whether the trained student is dense or a mixture of experts."""
    upcycle: UpcycleConfig | None = None
    """Settings to make a dense checkpoint sparse; null if the student is dense or the checkpoint is sparse already."""
    lora: LoraConfig | None = None
    """Settings to train low-rank adapters; null: none."""
    capacity_factor: float | None = None
    """In training, an expert takes at most ⌈factor · top_k · tokens / num_experts⌉ tokens of a micro-batch; null: no
    limit."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, with a linear warm-up followed by a schedule."""

    lr: float = 2e-5
    """Peak learning rate."""
    projector_lr: float | None = None
    """Peak learning rate of the projector, short for part_lr={projector: RATE}; null: lr."""
    part_lr: dict[str, float] | None = None
    """Peak learning rates of parts (see trainable) that have their own, such as {projector: 2e-5, vision: 2e-6}; of two
    parts that hold a parameter, the smaller one's counts."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from 0, between 0 and 1."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: down to 0, or unchanged."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rates of parts that have their own."""
        own = {} if self.projector_lr is None else {"projector": self.projector_lr}
        return own | (self.part_lr or {})


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of batches, in samples (preference pairs in stage preference)."""

    global_size: int = 128
    """Samples per optimiser step, over all processes: a multiple of micro_size times the processes."""
    micro_size: int = 1
    """Samples per forward pass of one process; lower it if memory runs out."""


@dataclass(frozen=True)
class TrainEngineConfig:
    """DeepSpeed."""

    zero_stage: int | None = None
    """ZeRO stage 0, 1, 2 or 3; null: 2 for several processes or with offload, for one process 0 in float32 and 1 in
    bfloat16."""
    offload: bool = False
    """Keep the optimiser's state in host memory (needs ZeRO 2 or 3)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of weights and activations; auto: bfloat16 on a GPU, otherwise float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention of the student in training; auto: what transformers chooses, usually sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    stage: Stage = "???"  # type: ignore[assignment]
    """What the run trains; its recipe gives the settings that you leave out."""
    output: str = "???"
    """Folder of the run; rerun the same command to resume. The student is written to OUTPUT/student."""
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheSourceConfig = field(default_factory=CacheSourceConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    template: str = "auto"
    """Wording of prompts: auto (what the checkpoint's chat template says; a student without one takes the cache's, or
    else qwen), qwen (LLaVA-MoD's own), chatml, llava_v1, or tokenizer (the student's chat template)."""
    image_aspect: ImageAspect = "auto"
    """How the images of a LLaVA become square: pad (padded), square (resized and cropped as the checkpoint's image
    processor does), or auto (square in stage align, as in the original's script, pad in the others). Other families
    take images of any shape: auto."""
    max_length: int = 2048
    """Most tokens of a sample, image tokens included."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    epochs: int = 1
    """Passes over the set."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    trainable: list[str] = field(default_factory=lambda: ["projector", "text"])
    """Parts to train (in full, beside student.lora): vision, projector, text (the whole language model), or parts of
    it: embeddings, attention, mlp, experts, router, norms, lm_head."""
    engine: TrainEngineConfig = field(default_factory=TrainEngineConfig)
    seed: int = 0
    """Seed of the order of samples, the held-out samples and new weights."""
    save_steps: int = 1000
    """Steps between checkpoints; 0: none, but for a last one until the student is exported."""
    keep_last: int = 2
    """Checkpoints to keep."""
    log_steps: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_steps: int = 0
    """Steps between evaluations of the loss on held-out samples (needs data.holdout); 0: none."""
    tracker: TrackerName = "none"
    """Where the numbers of metrics.jsonl are logged as well."""
    workers: int | None = None
    """Processes that make batches, 0 for none; null: one per spare core, at most 8."""

    def __post_init__(self) -> None:
        raise_problems(config_problems(self))

    @property
    def roles(self) -> tuple[str, ...]:
        """The sample roles that the stage reads; it trains on all but `mismatched`, which is only evaluated."""
        if self.stage != "preference":
            return ("response",)
        return ("chosen", "rejected", "mismatched") if self.loss.kind == "kto" else ("chosen", "rejected")

    @property
    def llava_aspect(self) -> ImageAspect:
        """How the images of a LLaVA become square: as set, or else as in the scripts of LLaVA-MoD."""
        if self.image_aspect != "auto":
            return self.image_aspect
        return "square" if self.stage == "align" else "pad"

    @property
    def needs_cache(self) -> bool:
        """Whether the stage learns from a teacher's cache."""
        return self.stage in CACHED_STAGES
