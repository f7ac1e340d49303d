"""Model families: how a checkpoint folder turns samples into tokens and model inputs, and how its model is run.

    folder ──open_family──▶ Family ──encode───▶ token ids of a (sample, role), each image expanded
                               ├─────images───▶ the arrays of a sample's images
                               ├─────load─────▶ the model of transformers
                               └─model_inputs─▶ what its `forward` takes for a batch of both

The same object serves capture, questions, evaluation and vLLM; no caller asks for a family's name. `image_text` handles
any image-text model by its own processor (`processor`) and whole model (`run`), and is checked against both (`probes`,
`run.check_model`). Families with a module of their own can run faster: image features are computed once and put among
the embeddings (`protocol.FeatureFamily`), and vLLM is fed their images one by one. `students` trains them all: `llava`
by its own forward pass, the others as whole models.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.encode.template import Template
from llavamod_offline.errors import ModelError
from llavamod_offline.families.protocol import Family, SampleImage
from llavamod_offline.models.checkpoint import load_tokenizer, read_json

__all__ = ["Family", "SampleImage", "is_llava", "open_family"]

# Families with modules of their own, by config.json's model_type: module and class.
_FAMILIES = {
    "llava": ("llava.family", "LlavaFamily"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionFamily"),
    "qwen2_vl": ("qwen_vl", "QwenVlFamily"),
    "qwen2_5_vl": ("qwen_vl", "QwenVlFamily"),
}

# Image-text models that transformers knows only as language models.
_MULTIMODAL = ("phi4_multimodal",)


def open_family(folder: Path, template: Template | str, *, image_aspect: str, max_length: int) -> Family:
    """Open a checkpoint folder without its weights; `template`: one, or the name of one.

    Errors: `ModelError` if its family is not supported; `ConfigError` for the template.
    """
    module, class_name = _family(folder)
    opener = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    if isinstance(template, str) and module != "image_text":  # image_text asks its processor
        template = choose_template(template, lambda: load_tokenizer(folder), image=opener.written or None)
    return cast("Family", opener(folder, template, image_aspect=image_aspect, max_length=max_length))


def is_llava(folder: Path) -> bool:
    """Whether a folder is a LLaVA whose images all take the same number of tokens. Errors: as `open_family`."""
    return _family(folder) == _FAMILIES["llava"]


def _family(folder: Path) -> tuple[str, str]:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    config = read_json(folder, "config.json")
    model_type = str(config.get("model_type"))
    vision = config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    if model_type in _FAMILIES and tower != "pixtral":  # a LLaVA whose images may have any size
        return _FAMILIES[model_type]
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image_text", "ImageTextFamily"
    if model_type in _MULTIMODAL:
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', which none of transformers' "
            "image-text classes covers: give the folder of another checkpoint"
        )
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal_lm", "CausalLmFamily"
    raise ModelError(
        f"{folder}/config.json: model_type is '{model_type}', for which transformers has neither an image-text model "
        "nor a language model (code in a checkpoint's folder is never run): give the folder of another checkpoint"
    )
