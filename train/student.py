"""Load a student from a checkpoint of an earlier stage, or build it from a vision tower and a language model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME, choose_template
from llavamod_offline.data.encode.template import AUTO, TEMPLATES, get_template
from llavamod_offline.errors import ConfigError, ModelError, first_line
from llavamod_offline.models.building import build_llava, build_tokenizer
from llavamod_offline.models.building.projector import projector_file
from llavamod_offline.models.capacity import limit_capacity
from llavamod_offline.models.checkpoint import load_config, load_llava, load_tokenizer
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.models.lm_head import check_lm_head
from llavamod_offline.models.router_noise import add_router_noise
from llavamod_offline.models.single_choice import compare_single_choices
from llavamod_offline.models.sparse_twins import SPARSE_TYPES
from llavamod_offline.models.upcycle import upcycle
from train.config import StudentConfig
from train.lora import add_adapters

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

    from llavamod_offline.data.encode.template import Template


logger = logging.getLogger(__name__)

# The files beside the weights that decide what is learned.
_DESCRIBED = ("config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json", CHAT_TEMPLATE_NAME)


@dataclass(frozen=True)
class StudentSource:
    """The folders a student is made of: that of its tokenizer and that of its image processor.

    `is_checkpoint`: it is a LLaVA model already, not built from parts.
    """

    tokenizer: PreTrainedTokenizerFast
    processor: Path
    is_checkpoint: bool


def open_source(config: StudentConfig) -> StudentSource:
    """Find the student's tokenizer and image processor, and check what does not need its weights.

    Errors: `ConfigError` if the checkpoint is sparse and `kind` dense or the reverse; `ModelError` if a folder is not a
    checkpoint.
    """
    if config.checkpoint is None:
        assert config.vision_tower is not None
        assert config.language_model is not None
        if config.kind == "sparse" and config.upcycle is None:
            raise ConfigError("student.upcycle: the language model is dense: set student.upcycle to make it sparse")
        return StudentSource(
            build_tokenizer(checkpoint_folder(config.language_model)), checkpoint_folder(config.vision_tower), False
        )
    folder = checkpoint_folder(config.checkpoint)
    sparse = is_sparse_checkpoint(folder)
    if sparse and config.upcycle is not None:
        raise ConfigError(f"student.upcycle: {folder} is already sparse: set student.upcycle to null")
    if sparse and config.kind == "dense":
        raise ConfigError(f"student.kind: {folder} is sparse: set student.kind to sparse, or use a dense checkpoint")
    if not sparse and config.kind == "sparse" and config.upcycle is None:
        raise ConfigError(
            f"student.upcycle: {folder} is dense: set student.upcycle to make it sparse, or student.kind to dense"
        )
    return StudentSource(load_tokenizer(folder), folder, True)


def is_sparse_checkpoint(folder: Path) -> bool:
    """Whether a student's text model has experts."""
    return load_config(folder).text_config.model_type in SPARSE_TYPES


def student_template(name: str, source: StudentSource, cached: Mapping[str, Any] | None) -> Template:
    """The wording of a student's conversations; `cached`: the `template` section of a cache's fingerprint.

    "auto" is that of the checkpoint, as its chat template says it. A student without one, such as a new one, takes that
    of the cache, if its tokenizer has it, and without a cache LLaVA-MoD's.
    Errors: `ConfigError` if the checkpoint's chat template cannot be followed, or the cache's wording is unknown.
    """
    tokenizer = source.tokenizer
    if name != AUTO:
        return choose_template(name, lambda: tokenizer)
    if source.is_checkpoint and tokenizer.chat_template:
        template = choose_template(AUTO, lambda: tokenizer)
        logger.info("template: %s, that of %s", template.name, tokenizer.name_or_path)
    elif cached is not None:
        template = _template_of(cached, tokenizer)
        logger.info("template: %s, that of the teacher's cache", template.name)
    else:
        template = get_template("qwen")
        logger.info("template: %s, LLaVA-MoD's, for a student without one", template.name)
    return template


def _template_of(cached: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> Template:
    from teacher_cache.fingerprint import is_template

    name = cached["name"]
    found = None
    with contextlib.suppress(ConfigError):  # then the student has no such wording
        found = choose_template(str(name), lambda: tokenizer)
    if found is None or not is_template(found, cached):
        raise ConfigError(
            f"template 'auto': the cache was captured with template {name} (sha256 {str(cached['sha256'])[:16]}…), "
            f"which the student's tokenizer does not have: set template to {', '.join(TEMPLATES)}"
        )
    return found


def start_digest(config: StudentConfig) -> str:
    """Hash the contents of the checkpoints that a run starts from, whatever their paths, as SHA-256 (hex).

    Errors: `ModelError` if one is missing.
    """
    from teacher_cache.format.manifest import sha256_files

    names = (config.checkpoint, config.vision_tower, config.language_model)
    folders = [checkpoint_folder(name) for name in names if name]
    files: list[tuple[str, Path]] = []
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such checkpoint folder")
        found = [*folder.glob("*.safetensors"), *(folder / name for name in _DESCRIBED)]
        files += [(f"{number} {file.name}", file) for file in sorted(found) if file.is_file()]
    if config.projector is not None:
        files.append(("projector", projector_file(Path(config.projector))))
    hashes = sha256_files([file for _, file in files])
    named = [f"{name} {digest}\n" for (name, _), digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()


def make_student(config: StudentConfig, *, seed: int, attention: str = "auto") -> LlavaForConditionalGeneration:
    """Load or build the student, upcycling it if configured; float32, on the CPU, in training mode.

    Errors: `ModelError` for checkpoints that do not fit; `ConfigError` if the student has no such attention, or no
    layers for its adapters.
    """
    if config.checkpoint is not None:
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
    return model
