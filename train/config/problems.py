"""Checks of a training run's settings alone; those that need the checkpoint, data or cache are in `setup.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from train.config.lora import lora_problems
from train.config.loss import loss_problems
from train.config.other_tokenizer import other_tokenizer_problems

if TYPE_CHECKING:
    from train.config.train import CacheSourceConfig, OptimConfig, StudentConfig, TrainConfig

PARTS = ("vision", "projector", "text", "embeddings", "attention", "mlp", "experts", "router", "norms", "lm_head")


def config_problems(config: TrainConfig) -> Iterable[str]:
    """Yield one line for each problem, naming the key to change."""
    yield from _number_problems(config)
    yield from loss_problems(config.loss, config.stage)
    yield from _stage_problems(config)
    yield from other_tokenizer_problems(config)
    yield from _student_problems(config.student)
    unknown = [part for part in config.trainable if part not in PARTS]
    if unknown or not (config.trainable or config.student.lora):
        named = f"'{unknown[0]}' is unknown" if unknown else "is empty"
        yield f"trainable: {named}: choose from {', '.join(PARTS)}"
    yield from _rate_problems(config.optim)
    if config.student.lora is not None:
        yield from lora_problems(
            config.student.lora,
            config.trainable,
            has_checkpoint=config.student.checkpoint is not None,
            upcycles=config.student.upcycle is not None,
        )


def _stage_problems(config: TrainConfig) -> Iterable[str]:
    if config.needs_cache and config.cache.path is None:
        yield f"cache.path: stage {config.stage} learns from a teacher's cache: set cache.path to one"
    if not config.needs_cache and config.cache.path is not None:
        yield f"cache.path: stage {config.stage} uses no teacher: remove cache.path"
    if not config.needs_cache:
        cache = config.cache
        given = {"missing": cache.missing != "error", "end_of_turn": cache.end_of_turn, "allow": cache.allow}
        for name in (name for name, is_given in given.items() if is_given):
            yield f"cache.{name}: stage {config.stage} uses no teacher: remove it"
    yield from _cache_problems(config.cache)
    if config.stage == "mimic_dense" and config.student.kind != "dense":
        yield "student.kind: stage mimic_dense trains a dense student: set it to dense, or stage to mimic_sparse"
    if config.stage == "mimic_sparse" and config.student.kind != "sparse":
        yield "student.kind: stage mimic_sparse trains a sparse student: set it to sparse, or stage to mimic_dense"
    if config.loss.router_aux_coef and config.student.kind != "sparse":
        yield "loss.router_aux_coef: a dense student has no router: set it to 0, or student.kind to sparse"
    if "router" in config.trainable and config.student.kind != "sparse":
        yield "trainable: a dense student has no router: remove 'router', or set student.kind to sparse"


def _cache_problems(cache: CacheSourceConfig) -> Iterable[str]:
    paths = cache.path
    listed: list[object] = [*(paths.values() if isinstance(paths, dict) else paths if isinstance(paths, list) else ())]
    if isinstance(paths, list | dict) and not paths:
        yield "cache.path: names no cache: set it to one, or to several"
    for path in listed:
        if not isinstance(path, str):
            yield f"cache.path: {path} is not a path: write a list of paths, or a mapping of sources to one path each"
    twice = [path for number, path in enumerate(listed) if path in listed[:number]]
    if isinstance(paths, list) and twice:
        yield f"cache.path: '{twice[0]}' is listed twice: list each cache once, and set cache.weights"
    if cache.weights is None:
        return
    if not isinstance(paths, list):
        yield "cache.weights: only a list of caches is mixed: remove it, or set cache.path to a list"
    elif len(cache.weights) != len(paths):
        yield f"cache.weights: {len(cache.weights)} for the {len(paths)} caches of cache.path: give one for each"
    for weight in cache.weights:
        if not 0 < weight < math.inf:
            yield f"cache.weights: {weight:g}: must be above 0 and finite; leave a cache out of cache.path instead of 0"


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
    if student.checkpoint is not None:
        for name in ("projector", "projector_type", "vision_feature_layer", "vision_feature_select_strategy"):
            if getattr(student, name) is not None:
                yield (
                    f"student.{name}: student.checkpoint says it already: remove it, or start from "
                    "student.vision_tower and student.language_model"
                )
    if student.capacity_factor is not None and student.kind != "sparse":
        yield "student.capacity_factor: a dense student has no experts: set it to null, or student.kind to sparse"
    if student.capacity_factor is not None and not student.capacity_factor > 0:
        yield f"student.capacity_factor is {student.capacity_factor:g}: must be above 0"
    if student.upcycle is None:
        return
    if student.kind != "sparse":
        yield "student.upcycle: upcycling makes a sparse student: set student.kind to sparse, or upcycle to null"
    experts = student.upcycle.num_experts
    fewest = experts if isinstance(experts, int) else min(experts, default=0)
    if fewest < 2:
        yield f"student.upcycle.num_experts: {fewest} is too few: use 2 or more"
    if not 1 <= student.upcycle.top_k <= fewest:
        yield (
            f"student.upcycle.top_k is {student.upcycle.top_k}: must be from 1 to student.upcycle.num_experts, {fewest}"
        )
    for name in ("expert_noise", "router_noise"):
        noise = getattr(student.upcycle, name)
        if not 0 <= noise < math.inf:
            yield f"student.upcycle.{name} is {noise:g}: must be 0 or more"


def _rate_problems(optim: OptimConfig) -> Iterable[str]:
    parts = optim.part_lr or {}
    for part in parts:
        if part not in PARTS:
            yield f"optim.part_lr: '{part}' is unknown: choose from {', '.join(PARTS)}"
    if optim.projector_lr is not None and "projector" in parts:
        yield "optim.projector_lr: optim.part_lr has a rate of the projector as well: remove one of them"


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
        "optim.projector_lr": 1 if optim.projector_lr is None else optim.projector_lr,
        **{f"optim.part_lr.{part}": rate for part, rate in (optim.part_lr or {}).items()},
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
    for key, value in positive.items():
        if not 0 < value < math.inf:
            yield f"{key} is {value:g}: must be above 0 and finite"
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            yield f"{key} is {value:g}: must not be negative or infinite"
    if not 0 <= optim.warmup_ratio <= 1:
        yield f"optim.warmup_ratio is {optim.warmup_ratio:g}: must be from 0 to 1"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas is {list(optim.betas)}: both must be at least 0 and below 1"
    if config.engine.zero_stage not in (None, 0, 1, 2, 3):
        yield f"engine.zero_stage is {config.engine.zero_stage}: must be 0, 1, 2 or 3"
    if config.engine.offload and config.engine.zero_stage not in (None, 2, 3):
        yield "engine.offload: offloading needs ZeRO: set engine.zero_stage to 2 or 3"
    if config.batch.global_size % config.batch.micro_size:
        yield (
            f"batch.micro_size: {config.batch.micro_size} does not divide batch.global_size {config.batch.global_size}"
        )
    if config.eval_steps and not config.data.holdout:
        yield "eval_steps: needs held-out samples: set data.holdout to their number"
