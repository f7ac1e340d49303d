"""The vision tower of a student that is built from parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.towers import TOWER_TYPES
from llavamod_offline.models.checkpoint import load_weights, read_json

_JOINT = ("clip", "siglip")  # image-text models whose vision tower is one of `TOWER_TYPES`


def load_tower(folder: Path, dtype: torch.dtype) -> Any:
    """Load the vision tower of a folder that holds a tower alone, a CLIP or SigLIP model, or a LLaVA.

    SigLIP 2 has two types: checkpoints of a fixed resolution are `siglip`, NaFlex ones are `siglip2`.
    Errors: `ModelError` if the folder holds something else.
    """
    model_type = read_json(folder, "config.json").get("model_type")
    if model_type == "llava":
        return load_llava(folder, dtype).model.vision_tower
    if model_type in _JOINT:
        return load_weights(AutoModel, folder, dtype=dtype).vision_model
    if model_type in TOWER_TYPES:
        return load_weights(AutoModel, folder, dtype=dtype)
    if str(model_type).startswith("siglip2"):
        raise ModelError(
            f"{folder}: a SigLIP 2 of variable resolution (NaFlex) needs the sizes of its images, which "
            "LlavaForConditionalGeneration does not pass on: use one of a fixed resolution, such as "
            "siglip2-so400m-patch14-384"
        )
    raise ModelError(
        f"{folder}/config.json: model_type is '{model_type}', expected {', '.join((*_JOINT, *TOWER_TYPES))} or llava: "
        "use the folder of such a vision tower"
    )
