"""The families of checkpoints that can teach, one module each; `open_teacher` finds the one of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavamod_offline.data.encode.template import Template
from llavamod_offline.errors import ModelError
from llavamod_offline.models.checkpoint import read_json
from teacher_cache.teachers.protocol import SampleImage, Teacher

__all__ = ["SampleImage", "Teacher", "open_teacher"]


_QWEN_VL = ("qwen2_vl", "qwen2_5_vl")
KNOWN = ("llava", "llava_onevision", *_QWEN_VL)


def open_teacher(folder: Path, template: Template, *, image_aspect: str, max_length: int) -> Teacher:
    """Open a checkpoint folder, all but its weights. Errors: `ModelError` if it is of no family that is known."""
    model_type = read_json(folder, "config.json").get("model_type")
    settings: dict[str, Any] = {"image_aspect": image_aspect, "max_length": max_length}
    if model_type == "llava":
        from teacher_cache.teachers.llava import LlavaTeacher

        return LlavaTeacher(folder, template, **settings)
    if model_type == "llava_onevision":
        from teacher_cache.teachers.llava_onevision import LlavaOnevisionTeacher

        return LlavaOnevisionTeacher(folder, template, **settings)
    if model_type in _QWEN_VL:
        from teacher_cache.teachers.qwen_vl import QwenVlTeacher

        return QwenVlTeacher(folder, template, **settings)
    if _is_causal_lm(model_type):
        from teacher_cache.teachers.causal_lm import CausalLmTeacher

        return CausalLmTeacher(folder, template, **settings)
    raise ModelError(
        f"{folder}/config.json: model_type is '{model_type}', which is none of {', '.join(KNOWN)}, nor a causal "
        "language model without images: give the folder of such a checkpoint"
    )


def _is_causal_lm(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    # Some models with images stand in both lists.
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
