"""The model families that can teach, one module each; `open_teacher` picks the one of a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

from llavamod_offline.data.encode.template import Template
from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import read_json
from teacher_cache.teachers.protocol import SampleImage, Teacher

__all__ = ["SampleImage", "Teacher", "open_teacher"]

# By config.json's model_type: module and class.
_FAMILIES = {
    "llava": ("llava", "LlavaTeacher"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionTeacher"),
    "qwen2_vl": ("qwen_vl", "QwenVlTeacher"),
    "qwen2_5_vl": ("qwen_vl", "QwenVlTeacher"),
}


def open_teacher(folder: Path, template: Template, *, image_aspect: str, max_length: int) -> Teacher:
    """Open a checkpoint folder without its weights. Errors: `ModelError` if its family is not supported."""
    model_type = read_json(folder, "config.json").get("model_type")
    family = ("causal_lm", "CausalLmTeacher") if _is_causal_lm(model_type) else _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', which is none of {', '.join(_FAMILIES)}, nor a "
            "causal language model without images: give the folder of such a checkpoint"
        )
    opener = getattr(importlib.import_module(f"{__name__}.{family[0]}"), family[1])
    return cast("Teacher", opener(folder, template, image_aspect=image_aspect, max_length=max_length))


def _is_causal_lm(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    # Some models with images are in both lists.
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
