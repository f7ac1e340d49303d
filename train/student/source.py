"""What a student is made of: its folders, its kind, the wording of its conversations, and a digest of them all."""

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
from llavamod_offline.errors import ConfigError
from llavamod_offline.families import is_llava
from llavamod_offline.families.folder import read_config
from llavamod_offline.families.llava.building import build_tokenizer
from llavamod_offline.families.llava.building.projector import projector_file
from llavamod_offline.models.checkpoint import check_folder, load_tokenizer
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.models.loading.adapter import adapter_files
from llavamod_offline.models.loading.quantised import quantisation
from llavamod_offline.models.sparse_twins import SPARSE_TYPES
from train.config import StudentConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.template import Template


logger = logging.getLogger(__name__)

# The files beside the weights that affect what is learnt.
_DESCRIBED = ("config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json", CHAT_TEMPLATE_NAME)


@dataclass(frozen=True)
class StudentSource:
    """The tokenizer of a student, and the folder of its image processor.

    `is_checkpoint`: it is a model already, not built from parts. `is_llava`: it is, or becomes, a LLaVA.
    """

    tokenizer: PreTrainedTokenizerFast
    processor: Path
    is_checkpoint: bool
    is_llava: bool


def open_source(config: StudentConfig) -> StudentSource:
    """Find the student's tokenizer and image processor, and check what does not need its weights.

    Errors: `ConfigError` if the checkpoint is sparse and `kind` dense or the reverse, or weights are quantised;
    `ModelError` if a folder is not a checkpoint.
    """
    if config.checkpoint is None:
        assert config.vision_tower is not None
        assert config.language_model is not None
        if config.kind == "sparse" and config.upcycle is None:
            raise ConfigError("student.upcycle: the language model is dense: set student.upcycle to make it sparse")
        language_model = _full_precision("student.language_model", config.language_model)
        tower = _full_precision("student.vision_tower", config.vision_tower)
        return StudentSource(build_tokenizer(language_model), tower, False, True)
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    folder = _full_precision("student.checkpoint", config.checkpoint)
    llava = is_llava(folder)
    if type(read_config(AutoConfig, folder)) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"student.checkpoint: {folder} is a language model without images: set student.language_model to it, and "
            "student.vision_tower, to build a LLaVA from it"
        )
    sparse = is_sparse_checkpoint(folder)
    if sparse and config.upcycle is not None:
        raise ConfigError(f"student.upcycle: {folder} is already sparse: set student.upcycle to null")
    if sparse and config.kind == "dense":
        raise ConfigError(f"student.kind: {folder} is sparse: set student.kind to sparse, or use a dense checkpoint")
    if not sparse and config.kind == "sparse" and config.upcycle is None:
        raise ConfigError(
            f"student.upcycle: {folder} is dense: set student.upcycle to make it sparse, or student.kind to dense"
        )
    return StudentSource(load_tokenizer(folder), folder, True, llava)


def is_sparse_checkpoint(folder: Path) -> bool:
    """Whether a student's text model has experts."""
    from transformers import AutoConfig

    return read_config(AutoConfig, folder).get_text_config().model_type in SPARSE_TYPES


def _full_precision(setting: str, name: str) -> Path:
    """Find a checkpoint that can be trained. Errors: `ConfigError` if its weights are quantised."""
    folder = checkpoint_folder(name)
    if method := quantisation(folder):
        raise ConfigError(
            f"{setting}: {folder}: its weights are quantised ({method}), and training needs them in full precision: "
            "give the checkpoint that they were quantised from"
        )
    return folder


def student_template(name: str, source: StudentSource, cached: Mapping[str, Any] | None) -> Template:
    """The wording of a student's conversations; `cached`: the `template` section of a cache's fingerprint.

    "auto" is the checkpoint's own, as its chat template gives it. A student without one, such as a new one, takes the
    cache's, which its tokenizer must have, or without a cache LLaVA-MoD's.
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
    with contextlib.suppress(ConfigError):  # then the student's tokenizer does not have it
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
        check_folder(folder)
        found = [*folder.glob("*.safetensors"), *(folder / name for name in _DESCRIBED), *adapter_files(folder)]
        files += [(f"{number} {file.name}", file) for file in sorted(found) if file.is_file()]
    if config.projector is not None:
        files.append(("projector", projector_file(Path(config.projector))))
    hashes = sha256_files([file for _, file in files])
    named = [f"{name} {digest}\n" for (name, _), digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(named).encode()).hexdigest()
