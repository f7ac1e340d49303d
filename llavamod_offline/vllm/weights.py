"""Check that a checkpoint folder holds every weight of its model: vLLM leaves missing ones uninitialised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llavamod_offline.errors import ModelError
from llavamod_offline.families.folder import read_config
from llavamod_offline.models.checkpoint import load_tensors, open_tensors, read_json
from llavamod_offline.models.loading.quantised import quantisation

_DTYPE = torch.bfloat16  # of the stand-ins, each an expanded single number
_NUMBER = torch.zeros((), dtype=_DTYPE)


def check_weights(folder: Path) -> None:
    """Compare names and shapes with those that transformers derives from config.json; reads headers only.

    For quantised weights, which are stored in several tensors each, layers are compared.
    Errors: `ModelError` if a tensor is missing, unexpected or of the wrong shape, or a file cannot be read.
    """
    import transformers

    (name,) = read_json(folder, "config.json")["architectures"]
    model_class: Any = getattr(transformers, name, None)
    if model_class is None:
        raise ModelError(f"{folder}/config.json: transformers has no '{name}', so its weights cannot be checked")
    config = read_config(model_class.config_class, folder)
    quantised = quantisation(folder) is not None
    shapes = _shapes(folder)
    if quantised:
        for part in (config, config.get_text_config()):
            vars(part).pop("quantization_config", None)
        shapes = _whole(shapes)
    try:
        load_tensors(model_class, config, shapes, dtype=_DTYPE, any_shape=quantised)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _whole(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """One weight for each layer whose weight is in several tensors, such as `qweight`, `scales` and `qzeros`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in shapes.items():
        layer, _, part = name.partition(".weight.") if ".weight." in name else name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    found = {}
    for layer, parts in layers.items():
        if parts.keys() & {"qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "absmax"}:
            parts = {part: tensor for part, tensor in parts.items() if part == "bias"} | {"weight": _NUMBER}
        found.update({f"{layer}.{part}": tensor for part, tensor in parts.items()})
    return found


def _files(folder: Path) -> list[Path]:
    """The files in the index, or the only one; some folders also hold the weights in another form."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = read_json(folder, SAFE_WEIGHTS_INDEX_NAME)
        return [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    return sorted(folder.glob("*.safetensors"))


def _shapes(folder: Path) -> dict[str, Tensor]:
    """A stand-in for each tensor of the folder's model, in the files that transformers would load."""
    found = {}
    for file in _files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = torch.zeros((), dtype=_DTYPE).expand(tensors.get_slice(name).get_shape())
    if not found:
        raise ModelError(f"{folder}: no *.safetensors file: save the checkpoint with save_pretrained first")
    return found
