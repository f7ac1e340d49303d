"""The model families that can teach, one module each; `open_teacher` picks the one of a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.encode.template import Template
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import load_tokenizer, read_json
from teacher_cache.teachers.protocol import SampleImage, Teacher

__all__ = ["SampleImage", "Teacher", "open_teacher"]

_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# By config.json's model_type: module, class, and how the family's processor writes an image in text.
_FAMILIES = {
    "llava": ("llava", "LlavaTeacher", IMAGE_PLACEHOLDER),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionTeacher", IMAGE_PLACEHOLDER),
    "qwen2_vl": ("qwen_vl", "QwenVlTeacher", _QWEN_IMAGE),
    "qwen2_5_vl": ("qwen_vl", "QwenVlTeacher", _QWEN_IMAGE),
}


def open_teacher(folder: Path, template: Template | str, *, image_aspect: str, max_length: int) -> Teacher:
    """Open a checkpoint folder without its weights; `template`: one, or the name of one.

    Errors: `ModelError` if its family is not supported; `ConfigError` for the template.
    """
    module, class_name, image = _family(folder)
    if isinstance(template, str):
        template = choose_template(template, lambda: load_tokenizer(folder), image=image)
    opener = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    return cast("Teacher", opener(folder, template, image_aspect=image_aspect, max_length=max_length))


def _family(folder: Path) -> tuple[str, str, str | None]:
    model_type = read_json(folder, "config.json").get("model_type")
    family = ("causal_lm", "CausalLmTeacher", None) if _is_causal_lm(model_type) else _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', which is none of {', '.join(_FAMILIES)}, nor a "
            "causal language model without images: give the folder of such a checkpoint"
        )
    return family


def _is_causal_lm(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    # Some models with images are in both lists.
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
