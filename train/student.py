"""Load a student from a checkpoint of an earlier stage, or build it from a vision tower and a language model."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME
from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.models.build import build_llava, build_tokenizer
from llavamod_offline.models.capacity import limit_capacity
from llavamod_offline.models.checkpoint import load_config, load_llava, load_tokenizer
from llavamod_offline.models.language_models import MOE_TYPES
from llavamod_offline.models.single_choice import compare_single_choices
from llavamod_offline.models.upcycle import upcycle
from train.config import StudentConfig

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast


# The files beside the weights that decide what is learned.
_DESCRIBED = ("config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json", CHAT_TEMPLATE_NAME)
_HASHED_AT_ONCE = 4


@dataclass(frozen=True)
class StudentSource:
    """The folders a student is made of: that of its tokenizer and that of its image processor."""

    tokenizer: PreTrainedTokenizerFast
    processor: Path


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
        return StudentSource(build_tokenizer(Path(config.language_model)), Path(config.vision_tower))
    folder = Path(config.checkpoint)
    sparse = load_config(folder).text_config.model_type in MOE_TYPES
    if sparse and config.upcycle is not None:
        raise ConfigError(f"student.upcycle: {folder} is already sparse: set student.upcycle to null")
    if sparse and config.kind == "dense":
        raise ConfigError(f"student.kind: {folder} is sparse: set student.kind to sparse, or use a dense checkpoint")
    if not sparse and config.kind == "sparse" and config.upcycle is None:
        raise ConfigError(
            f"student.upcycle: {folder} is dense: set student.upcycle to make it sparse, or student.kind to dense"
        )
    return StudentSource(load_tokenizer(folder), folder)


def start_digest(config: StudentConfig) -> str:
    """Hash the contents of the checkpoints that a run starts from, whatever their paths, as SHA-256 (hex).

    Errors: `ModelError` if one is missing.
    """
    from teacher_cache.format.manifest import sha256_file

    folders = [Path(name) for name in (config.checkpoint, config.vision_tower, config.language_model) if name]
    files: list[tuple[int, Path]] = []
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such checkpoint folder")
        found = [*folder.glob("*.safetensors"), *(folder / name for name in _DESCRIBED)]
        files += [(number, file) for file in sorted(found) if file.is_file()]
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:
        hashes = threads.map(lambda pair: sha256_file(pair[1]), files)
    named = [f"{number} {file.name} {digest}\n" for (number, file), digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()


def make_student(config: StudentConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """Load or build the student, upcycling it if configured; float32, on the CPU, in training mode."""
    if config.checkpoint is not None:
        model = load_llava(Path(config.checkpoint))
    else:
        model = build_llava(Path(str(config.vision_tower)), Path(str(config.language_model)), seed=seed)
    if config.upcycle is not None:
        choice = config.upcycle
        model = upcycle(
            model,
            layers=choice.layers,
            num_experts=choice.num_experts,
            top_k=choice.top_k,
            residual=choice.residual,
            seed=choice.seed,
        )
    if config.capacity_factor is not None:
        limit_capacity(model, config.capacity_factor)
    compare_single_choices(model)
    model.train()
    return model
