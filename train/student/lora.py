"""LoRA students with `peft`: adapters in a student's linear layers, and their merge into a plain checkpoint.

The base layer of an adapter is frozen; parts named by `trainable` are trained in full alongside. Adapters are layers
inside the student, so its class, its forward pass and its export stay the same.
Source: LoRA (arXiv 2106.09685): W + (alpha / rank) · B·A, with B = 0 at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.building.projector import fixed_parameters
from llavamod_offline.families.students.parts import model_parts
from llavamod_offline.models.routing import is_sparse
from llavamod_offline.storage import atomic
from train.engine.optim import is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"
_BASE = ".base_layer."
_PEFT_PREFIX = "base_model.model."  # of names in PEFT's files


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
) -> None:
    """Add adapters to the linear layers that `targets` name: parts (`attention`), or layers in one (`mlp.up_proj`).

    Their initial weights follow from `seed`.
    Errors: `ConfigError` if peft is not installed, or a target names no linear layer or the layers of experts.
    """
    peft = _import_peft()
    names = sorted({name for target in targets for name in _layers(model, target)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names), model, _ADAPTER
        )


def adapter_size(model: nn.Module) -> int:
    """Count the parameters of a student's adapters."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if is_adapter(name))


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters in a student's full `state` into its weights, named as in a student without adapters.

    Sums are computed in float32 and rounded once.
    """
    scales = {name: float(layer.scaling[_ADAPTER]) for name, layer in _adapted(model).items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        layer, _, parameter = name.rpartition(_BASE)
        if layer in scales and parameter == "weight":
            a_RI, b_OR = (state[f"{layer}.lora_{part}.{_ADAPTER}.weight"].float() for part in "AB")
            tensor = (tensor.float() + scales[layer] * (b_OR @ a_RI).to(tensor.device)).to(tensor.dtype)
        tensors[name.replace(_BASE, ".")] = tensor
    return tensors


def save_adapters(model: nn.Module, state: Mapping[str, Tensor], folder: Path, *, base: str) -> None:
    """Write the adapters, and the parts trained in full, as a PEFT folder for the checkpoint `base`, atomically."""
    trained = _trained(model)
    layers = _adapted(model)
    first = next(iter(layers.values()))
    config = _import_peft().LoraConfig(
        r=first.r[_ADAPTER],
        lora_alpha=first.lora_alpha[_ADAPTER],
        target_modules=sorted(layers),
        modules_to_save=saved_modules(model) or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors = {
        _PEFT_PREFIX + name.replace(f".{_ADAPTER}.", "."): state[name].detach().to("cpu").contiguous().clone()
        for name in trained
    }
    with atomic.new_folder(folder) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(aside)


def saved_modules(model: nn.Module) -> list[str]:
    """The outermost modules that are trained in full, as PEFT saves whole modules beside adapters.

    Errors: `ConfigError` for a trained parameter in a module that is not trained as a whole.
    """
    trained = {name for name in _trained(model) if not is_adapter(name)}
    names = sorted({name.rpartition(".")[0] for name in trained})
    for name in names:
        if any(own.startswith(f"{name}.") and own not in trained for own, _ in model.named_parameters()):
            bare = next(own for own in sorted(trained) if own.rpartition(".")[0] == name)
            raise ConfigError(
                f"student.lora.keep_adapters: PEFT saves whole modules, but '{bare}' is trained without the rest of "
                "its module: set it to false"
            )
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _layers(model: PreTrainedModel, target: str) -> list[str]:
    part, _, layer = target.partition(".")
    if part in ("mlp", "text") and is_sparse(model):
        raise ConfigError(
            f"student.lora.targets: '{target}' holds experts, which are not linear layers: adapt 'attention' and train "
            "experts in full (trainable: mlp), or leave student.lora out"
        )
    fixed, patterns = fixed_parameters(model), model_parts(model)
    own = [
        name
        for name, module in model.named_modules()
        if f"{name}.weight" not in fixed
        if type(module) is nn.Linear  # the subclass in nn.MultiheadAttention is never called
        if patterns[part].search(f"{name}.") and not patterns["lm_head"].search(f"{name}.")
    ]
    found = [name for name in own if layer in ("", name.rpartition(".")[2])]
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in own}))
        raise ConfigError(
            f"student.lora.targets: '{target}' names no linear layer of this student: {part} has {known or 'none'}"
        )
    return found


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _import_peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError("student.lora needs peft: pip install 'llavamod-offline[lora]'") from error
    return peft
