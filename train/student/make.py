"""Make a student: load or build its model, upcycle it, add adapters; and open its family."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavamod_offline.data.encode.template import AUTO
from llavamod_offline.data.images import AUTO_ASPECT
from llavamod_offline.errors import ConfigError, ModelError, first_line
from llavamod_offline.families import Family, open_family
from llavamod_offline.families.folder import longrope_from
from llavamod_offline.families.image_text import PALIGEMMA
from llavamod_offline.families.llava.building import build_llava
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.student import LlavaStudent
from llavamod_offline.families.run import check_model
from llavamod_offline.families.students.protocol import StudentFamily
from llavamod_offline.families.students.whole import WholeStudent
from llavamod_offline.models.capacity import limit_capacity
from llavamod_offline.models.checkpoint import read_json
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.models.lm_head import check_lm_head
from llavamod_offline.models.router_noise import add_router_noise
from llavamod_offline.models.routing import is_sparse
from llavamod_offline.models.single_choice import compare_single_choices
from llavamod_offline.models.sparse_twins import SPARSE_TYPES
from llavamod_offline.models.upcycle import upcycle
from train.config import StudentConfig, TrainConfig
from train.student.lora import add_adapters
from train.student.source import StudentSource, student_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavamod_offline.data.encode.template import Template

logger = logging.getLogger(__name__)


def open_student(
    config: TrainConfig, source: StudentSource, cached: Mapping[str, Any] | None, *, sharded: bool
) -> tuple[PreTrainedModel, StudentFamily]:
    """Make a run's student and open its family.

    `cached`: the `template` section of a cache's fingerprint. `sharded`: processes share the weights (ZeRO-3).
    Errors: those of `make_student` and `student_template`; `ConfigError` for settings that the family does not have.
    """
    model, family = _open(config, source, cached, sharded=sharded)
    longest = longrope_from(model.config)
    alone = config.batch.micro_size == 1 and config.stage != "preference"
    if longest is not None and config.max_length > longest and not alone:
        raise ConfigError(
            f"max_length is {config.max_length}, but beyond {longest} tokens the student's positions depend on the "
            f"longest sequence of a batch (longrope): set it to {longest}, or batch.micro_size to 1"
        )
    return model, family


def _open(
    config: TrainConfig, source: StudentSource, cached: Mapping[str, Any] | None, *, sharded: bool
) -> tuple[PreTrainedModel, StudentFamily]:
    model: Any
    if not source.is_llava:
        return _open_whole(config, source, cached, sharded=sharded)
    template = student_template(config.template, source, cached)
    model = make_student(config.student, seed=config.seed, attention=config.engine.attention)
    family = LlavaStudent.of(
        model.config,
        source.tokenizer,
        template,
        processor_source=source.processor,
        image_aspect=config.llava_aspect,
        max_length=config.max_length,
    )
    return model, family


def _open_whole(
    config: TrainConfig, source: StudentSource, cached: Mapping[str, Any] | None, *, sharded: bool
) -> tuple[PreTrainedModel, StudentFamily]:
    folder = source.processor
    if config.image_aspect != AUTO_ASPECT:
        raise ConfigError(
            f"image_aspect: '{config.image_aspect}' is for LLaVA students alone, and {folder} is not one: set it to "
            "auto, and its processor prepares the images"
        )
    template: Template | str = config.template
    unworded = not source.tokenizer.chat_template and read_json(folder, "config.json").get("model_type") != PALIGEMMA
    if config.template == AUTO and cached is not None and unworded:
        template = student_template(AUTO, source, cached)
    opened = open_family(folder, template, image_aspect=AUTO_ASPECT, max_length=sys.maxsize)
    logger.info("template: %s, of %s", opened.encoder.template.name, folder)
    if not opened.batches and (config.batch.micro_size > 1 or config.stage == "preference"):
        way_out = "choose another student" if config.stage == "preference" else "set it to 1"
        raise ConfigError(
            f"batch.micro_size: the processor of {folder} prepares images in a form that cannot be joined into a batch "
            f"of several sequences: {way_out}"
        )
    model = make_student(config.student, seed=config.seed, attention=config.engine.attention, opened=opened)
    if sharded and model.base_model is model:
        raise ConfigError(
            f"engine.zero_stage: {type(model).__name__} has no base model whose weights ZeRO-3 could gather: "
            "use another stage"
        )
    lora = [] if config.student.lora is None else config.student.lora.targets
    parts = {part.partition(".")[0] for part in (*config.trainable, *lora)}
    fills = sharded or bool(parts & {"vision", "projector"})
    return model, WholeStudent(opened, max_length=config.max_length, fills=fills)


def make_student(
    config: StudentConfig, *, seed: int, attention: str = "auto", opened: Family | None = None
) -> PreTrainedModel:
    """Load or build the student, upcycling it if configured; float32, on the CPU, in training mode.

    `opened`: the family of a checkpoint that is not a LLaVA.

    Errors: `ModelError` for checkpoints that do not fit; `ConfigError` if the student has no such attention, or no
    layers for its adapters.
    """
    model: Any
    if opened is not None:
        model = opened.load(torch.float32)
    elif config.checkpoint is not None:
        model = load_llava(checkpoint_folder(config.checkpoint))
    else:
        tower, text = (checkpoint_folder(str(name)) for name in (config.vision_tower, config.language_model))
        model = build_llava(
            tower,
            text,
            seed=seed,
            projector=None if config.projector is None else Path(config.projector),
            projector_type=config.projector_type,
            vision_feature_layer=-2 if config.vision_feature_layer is None else config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    if config.upcycle is not None:
        choice = config.upcycle
        model = upcycle(
            model,
            layers=choice.layers,
            num_experts=choice.num_experts,
            top_k=choice.top_k,
            residual=choice.residual,
            seed=choice.seed,
            expert_noise=choice.expert_noise,
        )
    if opened is not None:
        check_model(opened, model)
        _check_experts(model)
    else:
        check_lm_head(model, model.base_model, name=str(config.checkpoint or config.language_model))
    if config.upcycle is not None and config.upcycle.router_noise:
        add_router_noise(model, config.upcycle.router_noise)
    if config.capacity_factor is not None:
        limit_capacity(model, config.capacity_factor)
    compare_single_choices(model)
    if attention != "auto":
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"engine.attention: '{attention}' does not work here ({first_line(error)}): use auto"
            ) from (error)
    if config.lora is not None:
        add_adapters(
            model,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=config.lora.targets,
            seed=seed,
        )
    model.train()
    made: PreTrainedModel = model
    return made


def _check_experts(model: PreTrainedModel) -> None:
    """Refuse experts whose routers are unknown. Errors: `ModelError`."""
    if not is_sparse(model) and any(".experts." in name for name, _ in model.named_parameters()):
        kind = model.config.get_text_config().model_type
        raise ModelError(
            f"student.checkpoint: it is a mixture of experts of type '{kind}', whose routers cannot be trained here: "
            f"choose a dense student, or one of type {', '.join(SPARSE_TYPES)}"
        )
