"""The projector of a student that is built from parts: its type, and its weights, new or from a file.

    original                   LlavaForConditionalGeneration                       its `projector_hidden_act`
    mlp2x_gelu                 linear_1, GELU, linear_2                             gelu
    linear (mlp1x_gelu)        linear_1, then linear_2, which stays the identity    linear

The class has these two layers and no others, so deeper projectors cannot be exported and are refused.

Shape suffixes: C inputs (the tower's channels, times its feature layers), D hidden size of the language model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llavamod_offline.errors import ModelError, first_line

MLP, LINEAR = "mlp2x_gelu", "linear"
PROJECTOR_TYPES = (LINEAR, MLP)
PROJECTOR_FILE = "mm_projector.bin"

_ACTIVATIONS = {MLP: "gelu", LINEAR: "linear"}
_PREFIX = "model.multi_modal_projector."
_SUFFIXES = (".bin", ".pt", ".pth")
# A tensor's name in LLaVA's files (`mm_projector.0.weight`, or `mm_projector.weight` of a linear one), in LLaVA-MoD's
# (`mm_projector.image_spatial_proj.0.weight`) and in transformers' (`multi_modal_projector.linear_1.weight`), whatever
# precedes it.
_ORIGINAL = re.compile(r"(?:.*\.)?mm_projector\.(?:image_spatial_proj\.)?(?:(\d+)\.)?(weight|bias)")
_PORTED = re.compile(r"(?:.*\.)?multi_modal_projector\.linear_([12])\.(weight|bias)")


def check_projector_type(name: str) -> str:
    """Return the type that a name means. Errors: `ModelError` if LlavaForConditionalGeneration lacks it."""
    if name == "mlp1x_gelu":  # a single layer, with no GELU before it
        return LINEAR
    if name in PROJECTOR_TYPES:
        return name
    if re.fullmatch(r"mlp\d+x_gelu", name):
        raise ModelError(
            f"projector_type '{name}': transformers' LlavaForConditionalGeneration has a projector of two layers, so "
            f"a student with another one could not be loaded: use {' or '.join(PROJECTOR_TYPES)}"
        )
    raise ModelError(f"projector_type '{name}' is unknown: use {' or '.join(PROJECTOR_TYPES)}")


def projector_activation(kind: str) -> str:
    """Return the `projector_hidden_act` of a projector type."""
    return _ACTIVATIONS[kind]


def new_projector(inputs: int, hidden: int, seed: int, kind: str = MLP) -> dict[str, Tensor]:
    """Initialise a projector's tensors as `nn.Linear` does: uniform within ±1/√inputs."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, width in (("linear_1", inputs), ("linear_2", hidden)):
        bound = 1 / math.sqrt(width)
        for part, shape in (("weight", (hidden, width)), ("bias", (hidden,))):
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            tensors[f"{_PREFIX}{name}.{part}"] = values
    return tensors | (_identity(hidden) if kind == LINEAR else {})


def projector_file(path: Path) -> Path:
    """Find a projector's file, given itself or a pretraining folder of LLaVA. Errors: `ModelError` if it is missing."""
    file = path / PROJECTOR_FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file}: no such file: use LLaVA's {PROJECTOR_FILE}, or a safetensors file of a LLaVA model")
    return file


def read_projector(file: Path, *, kind: str | None, inputs: int, hidden: int) -> tuple[str, dict[str, Tensor]]:
    """Read a pretrained projector; return its type and its tensors, in float32.

    `file`: LLaVA's `mm_projector.bin`, the folder that holds it, or a safetensors file of a LLaVA model. `kind`: the
    type that it must have; None: any. Only tensors are unpickled.
    Errors: `ModelError` if the file is missing, damaged, or holds something else or tensors of other sizes.
    """
    file = projector_file(file)
    layers = _layers(file, _read_bin(file) if file.suffix in _SUFFIXES else _read_safetensors(file))
    linear = len(layers) == 1 or (len(layers) == 2 and _is_identity(layers[1]))
    found = LINEAR if linear else check_projector_type(f"mlp{len(layers)}x_gelu")
    if kind is not None and kind != found:
        raise ModelError(
            f"{file}: holds a projector of type {found}, not {kind}: leave the type out, or use another file"
        )
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(layers, start=1):
        shapes = {"weight": (hidden, inputs if number == 1 else hidden), "bias": (hidden,)}
        for name, shape in shapes.items():
            if name not in layer:
                raise ModelError(f"{file}: layer {number} of the projector has no {name}: use a complete file")
            if tuple(layer[name].shape) != shape:
                raise ModelError(
                    f"{file}: the {name} of the projector's layer {number} has shape {list(layer[name].shape)}, but "
                    f"tower and language model need {list(shape)}: use the projector that belongs to them"
                )
            tensors[f"{_PREFIX}linear_{number}.{name}"] = layer[name].float()
    return found, tensors | (_identity(hidden) if found == LINEAR else {})


def fixed_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that a linear projector keeps at the identity, whatever is trained."""
    if getattr(getattr(model, "config", None), "projector_hidden_act", None) != _ACTIVATIONS[LINEAR]:
        return set()
    named = {name: p.detach() for name, p in model.named_parameters() if "multi_modal_projector.linear_2." in name}
    return set(named) if _is_identity({name.rpartition(".")[2]: tensor for name, tensor in named.items()}) else set()


def _is_identity(layer: Mapping[str, Tensor]) -> bool:
    weight, bias = layer["weight"], layer.get("bias")
    return torch.equal(weight, torch.eye(*weight.shape).to(weight)) and (bias is None or not bias.any())


def _identity(hidden: int) -> dict[str, Tensor]:
    return {f"{_PREFIX}linear_2.weight": torch.eye(hidden), f"{_PREFIX}linear_2.bias": torch.zeros(hidden)}


def _read_bin(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ModelError(
            f"{file}: cannot be read as tensors alone ({first_line(error)}): copy it again; a file that holds other "
            "objects is refused, as unpickling them could run code"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{file}: expected named tensors: use the {PROJECTOR_FILE} of a LLaVA pretraining")
    strange = next((name for name in content if not (_ORIGINAL.fullmatch(name) or _PORTED.fullmatch(name))), None)
    if strange is not None:
        raise ModelError(
            f"{file}: holds '{strange}', which belongs to no projector of type {' or '.join(PROJECTOR_TYPES)}: use a "
            "projector that was trained alone"
        )
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            wanted = [name for name in tensors.keys() if _ORIGINAL.fullmatch(name) or _PORTED.fullmatch(name)]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: cannot be read as safetensors ({first_line(error)}): use LLaVA's {PROJECTOR_FILE}, or a "
            "safetensors file of a LLaVA model"
        ) from error


def _layers(file: Path, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Sort a projector's tensors into its linear layers."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _ORIGINAL.fullmatch(name) or _PORTED.fullmatch(name)
        assert match is not None
        layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    if not layers:
        raise ModelError(f"{file}: holds no projector (mm_projector… or multi_modal_projector…): use another file")
    numbers = sorted(layers)
    known = (
        [0],
        [1, 2],
        list(range(0, 2 * len(numbers), 2)),
    )  # nn.Linear, transformers' names, nn.Sequential with GELUs
    if numbers not in known or any("weight" not in layer for layer in layers.values()):
        raise ModelError(f"{file}: layers of the projector are missing: use a complete file")
    return [layers[number] for number in numbers]
