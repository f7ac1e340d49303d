"""Choose the trainable parts of a student, AdamW's groups and their rates, and the learning rate of a step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.llava.building.projector import fixed_parameters
from llavamod_offline.families.students.parts import Parts, model_parts


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return ".lora_A." in name or ".lora_B." in name


def choose_trainable(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Make only a student's named `parts` and its adapters trainable; returns the names of their parameters.

    `text` is the whole language model with embeddings and LM head; `mlp` its feed-forward layers, with experts but
    without routers. Errors: `ConfigError` if the student has no parameter in a part.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if is_adapter(name)}
    patterns = model_parts(model)
    own = {part: {name for name in names if pattern.search(name)} for part, pattern in patterns.items()}
    for part in parts:
        if not own[part]:
            hint = "it is tied to 'embeddings'" if part == "lm_head" else "it has none"
            known = ", ".join(name for name in own if own[name])
            raise ConfigError(
                f"trainable: no parameter of this student belongs to '{part}' ({hint}): remove it, or choose "
                f"from its parts, {known}"
            )
        chosen |= own[part]
    chosen -= fixed_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and parameter.numel() > 0)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def make_optimizer(
    model: nn.Module,
    patterns: Parts,
    *,
    lr: float,
    part_lr: Mapping[str, float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters, with weight decay on matrices but not on biases and norms.

    `patterns`: those of the student's parts. `part_lr`: the peak rates of parts that have their own; of several parts
    that hold a parameter, the smallest one's (such as `experts` rather than `mlp`) counts. The `rate_scale` of a group
    is its peak rate divided by `lr`.
    Errors: `ConfigError` if a part of `part_lr` has no trained parameter.
    """
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in patterns if part in part_lr}
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = [part for part in parts if patterns[part].search(name)]
            (parts[own[-1]] if own else others).append(parameter)
    for part, trained in parts.items():
        if not trained:
            raise ConfigError(
                f"optim.part_lr: no trained parameter takes the rate of '{part}': remove it, or add it to trainable"
            )
    groups: list[dict[str, Any]] = []
    for trained, scale in [(others, 1.0), *((parts[part], part_lr[part] / lr) for part in parts)]:
        for matrices in (True, False):
            chosen = [parameter for parameter in trained if (parameter.ndim >= 2) == matrices]
            decay = weight_decay if matrices else 0.0
            groups.append({"params": chosen, "weight_decay": decay, "lr": lr * scale, "rate_scale": scale})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps)


def learning_rate(step: int, *, steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Return the learning rate of `step` (from 0) of `steps`: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def frozen_digest(model: nn.Module) -> str:
    """Hash the names, shapes and summed bits of the frozen parameters, which checkpoints omit."""
    digest = hashlib.sha256()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
            digest.update(f"{name} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()
