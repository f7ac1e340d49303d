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
    """Number of samples to hold out of training; the loss on them is evaluated every eval_steps."""
    too_long: Literal["error", "drop"] = "error"
    """Samples of more than max_length tokens: end the run before its first step, or skip them and list them in
    rejected.jsonl."""
    window: int | None = None
    """Number of shards that are shuffled together; 0: all; null: all, or 16 if the set or the cache is remote or the
    cache's decoded records exceed 256 MB."""
    weights: dict[str, float] | None = None
    """How often each source's samples occur in an epoch, such as {coco: 2, ocr: 0.5}; sources not listed: 1. null: the
    set's own weights."""
    group_by_length: bool = False
    """Make batches of samples of similar length."""
    group_by_modality: bool = False
    """Put samples with images and samples without into separate batches; can be combined with group_by_length."""


@dataclass(frozen=True)
class CacheSourceConfig:
    """The teacher's cache; align and sft have none."""

    path: InputPath | list[InputPath] | dict[str, InputPath] | None = None
    """The cache of data.set: a folder that cache-teacher run made, or its URL. For several teachers: a list, such as
    [caches/a, caches/b], to learn from their mixture; or one cache for each source of the set, such as
    {ocr: caches/a, "*": caches/b}, where "*" stands for all other sources."""
    weights: list[float] | None = None
    """Mixture weights of the caches in a list, such as [2, 1]; null: all equal."""
    missing: Literal["error", "drop"] = "error"
    """Samples without a record in the cache: end the run, or leave them out."""
    end_of_turn: str | None = None
    """The only token that may differ, the one that ends a turn, as TEACHER_TOKEN=STUDENT_TOKEN, such as
    <|im_end|>=<|endoftext|>."""
    other_tokenizer: Literal["align"] | None = None
    """If the student's tokenizer is not the teacher's: align the two by the bytes of their tokens (mimic stages; see
    train/README.md); null: end the run."""
    allow: list[str] = field(default_factory=list)
    """Fields of the cache's fingerprint that may differ from the student's."""


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense checkpoint becomes a mixture of experts."""

    layers: str | list[int] = "sparse"
    """Layers to make sparse: sparse (every other), first_half, second_half, dense (all), or a list such as [0, 2]. Text
    models of Mistral, Llama, OLMo 2, Granite and Qwen3.5 need dense."""
    num_experts: int | list[int] = 4
    """Experts in each of these layers, at least 2; or a list with one number per layer, all equal."""
    top_k: int = 2
    """Experts that each token is routed to. With 1, training also runs the second most likely expert, with weight 0, to
    teach the router."""
    residual: bool = False
    """Keep the dense MLP as a shared expert."""
    seed: int = 0
    """Seed for the routers' initial weights and for expert_noise."""
    expert_noise: float = 0.0
    """Noise added to each expert's copy of the MLP, in units of the weights' standard deviation, such as 0.02. The
    student then no longer starts out identical to the dense one."""
    router_noise: float = 0.0
    """Noise added to the routers' logits in this run's training, in units of their standard deviation, such as 0.3."""


@dataclass(frozen=True)
class StudentConfig:
    """The initial student: a checkpoint, or a vision tower and a language model that become a LLaVA."""

    checkpoint: InputPath | None = None
    """Folder or Hub id (org/name) of an image-text model of any family, such as the student of the previous stage."""
    vision_tower: InputPath | None = None
    """Folder or Hub id of a vision tower; set it and language_model instead of checkpoint."""
    language_model: InputPath | None = None
    """Folder or Hub id of a language model; set it and vision_tower instead of checkpoint."""
    projector: InputPath | None = None
    """Pretrained projector for a student built from parts: LLaVA's mm_projector.bin (its pretrain_mm_mlp_adapter), a
    folder that holds one, or a LLaVA's safetensors file; null: a new one."""
    projector_type: str | None = None
    """Type of projector for a student built from parts: linear or mlp2x_gelu; null: that of the file, or mlp2x_gelu."""
    vision_feature_layer: int | list[int] | None = None
    """For a student built from parts: the vision tower's layer whose hidden states it sees, or several layers,
    concatenated; null: -2."""
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    """Image tokens of a student built from parts: default (patches, without the class token), full (with it); null:
    patches."""
    kind: Literal["dense", "sparse"] = "dense"
    """Whether the trained student is dense or a mixture of experts."""
    upcycle: UpcycleConfig | None = None
    """Settings for making a dense checkpoint sparse; null for a dense student or an already sparse checkpoint."""
    lora: LoraConfig | None = None
    """Settings for training low-rank adapters; null: none."""
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
    """Peak learning rates of individual parts (see trainable), such as {projector: 2e-5, vision: 2e-6}; a parameter
    that belongs to two of them takes the smaller part's rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_ratio: float = 0.03
    """Share of the steps, between 0 and 1, over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: falling to 0 along a cosine, or constant."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient; 0: no clipping."""

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rates of parts that have their own."""
        own = {} if self.projector_lr is None else {"projector": self.projector_lr}
        return own | (self.part_lr or {})


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of batches, in samples (preference pairs in stage preference)."""

    global_size: int = 128
    """Samples per optimiser step, over all processes; a multiple of micro_size times the number of processes."""
    micro_size: int = 1
    """Samples per forward pass of one process; lower it if memory runs out."""


@dataclass(frozen=True)
class TrainEngineConfig:
    """DeepSpeed."""

    zero_stage: int | None = None
    """ZeRO stage 0, 1, 2 or 3; null: 2 with several processes or offload; with one process, 0 in float32 and 1 in
    bfloat16."""
    offload: bool = False
    """Keep the optimiser state in host memory (needs ZeRO 2 or 3)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of weights and activations; auto: bfloat16 on a GPU, otherwise float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation in training; auto: the one that transformers chooses, usually sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training."""

    stage: Stage = "???"  # type: ignore[assignment]
    """Training stage; its recipe provides the settings that you leave out."""
    output: str = "???"
    """Folder of the run; rerun the same command to resume. The student is written to OUTPUT/student."""
    data: DataConfig = field(default_factory=DataConfig)
    cache: CacheSourceConfig = field(default_factory=CacheSourceConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    template: str = "auto"
    """Prompt template: auto (taken from the checkpoint's chat template; for a student without one, from the cache, or
    else qwen), qwen (LLaVA-MoD's own), chatml, llava_v1, or tokenizer (the student's chat template)."""
    image_aspect: ImageAspect = "auto"
    """How a LLaVA's images are made square: pad (padded), square (resized and cropped as the checkpoint's image
    processor does), or auto (square in stage align, as in LLaVA-MoD's script, pad in the others). Other families take
    images of any shape: leave it at auto."""
    max_length: int = 2048
    """Maximum length of a sample in tokens, image tokens included."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    epochs: int = 1
    """Passes over the set."""
    steps: int | None = None
    """Number of optimiser steps, instead of epochs."""
    trainable: list[str] = field(default_factory=lambda: ["projector", "text"])
    """Parts to train (in full, in addition to student.lora): vision, projector, text (the whole language model), or
    parts of the language model: embeddings, attention, mlp, experts, router, norms, lm_head."""
    engine: TrainEngineConfig = field(default_factory=TrainEngineConfig)
    seed: int = 0
    """Seed for the order of samples, the choice of held-out samples and the initialisation of new weights."""
    save_steps: int = 1000
    """Steps between checkpoints; 0: only a last one, deleted once the student is exported."""
    keep_last: int = 2
    """Number of latest checkpoints to keep."""
    log_steps: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_steps: int = 0
    """Steps between evaluations of the loss on held-out samples (needs data.holdout); 0: none."""
    tracker: TrackerName = "none"
    """Where else to log the metrics that are written to metrics.jsonl."""
    workers: int | None = None
    """Processes that prepare batches; 0: none; null: one per spare core, at most 8."""

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
