"""LoRA adapters of a student: their settings, and checks that they suit the parts trained in full."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Parts that may have adapters, each with the other parts that it contains or that contain it.
_SHARED = {
    "vision": (),
    "projector": (),
    "text": ("attention", "mlp", "experts", "embeddings", "router", "norms", "lm_head"),
    "attention": ("text",),
    "mlp": ("text", "experts"),
}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: low-rank adapters are trained instead of the layers they are in, and merged into the exported student."""

    rank: int = 128
    """Rank of the adapters; the defaults of this and the next two settings are LLaVA-MoD's."""
    alpha: float = 256.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout before the adapters; with 0, results do not depend on the micro-batch size or the number of processes."""
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    """Parts whose linear layers get adapters (vision, projector, text, attention, mlp), or certain layers of a part,
    such as attention.q_proj; the parts in trainable are trained in full as well."""
    keep_adapters: bool = False
    """Also write the adapters to OUTPUT/adapters, as a PEFT folder for student.checkpoint."""


def lora_problems(lora: LoraConfig, trainable: Sequence[str], *, has_checkpoint: bool, upcycles: bool) -> Iterable[str]:
    """Yield one line for each problem, naming the key to change."""
    if lora.rank < 1:
        yield f"student.lora.rank is {lora.rank}: must be at least 1"
    if not 0 < lora.alpha < math.inf:
        yield f"student.lora.alpha is {lora.alpha:g}: must be above 0 and finite"
    if not 0 <= lora.dropout < 1:
        yield f"student.lora.dropout is {lora.dropout:g}: must be at least 0 and below 1"
    if not lora.targets:
        yield f"student.lora.targets: is empty: choose from {', '.join(_SHARED)}, or set student.lora to null"
    for target in lora.targets:
        part = target.partition(".")[0]
        if part not in _SHARED:
            yield f"student.lora.targets: '{part}' is unknown: choose from {', '.join(_SHARED)}, or PART.LAYER of one"
            continue
        for full in trainable:
            if full == part or full in _SHARED[part]:
                yield (
                    f"trainable: '{full}' is trained in full, which leaves nothing to the adapters of '{target}': "
                    "name the parts to train in full beside them, such as [projector], or change student.lora.targets"
                )
    if not lora.keep_adapters:
        return
    if not has_checkpoint or upcycles:
        yield (
            "student.lora.keep_adapters: adapters need the checkpoint they are for, and this student is made anew: set "
            "it to false, or start from student.checkpoint without student.upcycle"
        )
    for full in trainable:
        if full != "projector":
            yield (
                f"student.lora.keep_adapters: '{full}' is trained in full, and is not written with adapters: set it to "
                "false, or trainable to [projector] or []"
            )
