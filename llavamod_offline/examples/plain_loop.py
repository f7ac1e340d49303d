"""Distil a student from a cache in a plain PyTorch loop.

    make demo ARGS=--quick
    python -m llavamod_offline.examples.plain_loop runs/demo/train/align/student runs/demo/sets/general \
        runs/demo/cache/general
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llavamod_offline.examples.batches import Batches
from llavamod_offline.examples.usage import read_paths
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.losses import CachedDistillation
from llavamod_offline.models.lm_head import lm_head_of
from teacher_cache import check_student, open_cache


def train(student: Path, data: Path, cache_path: Path, steps: Sequence[Sequence[str]], rate: float) -> list[float]:
    """Train on the keys of each step; return the losses."""
    cache, batches, model = open_cache(cache_path), Batches(student, data), load_llava(student)
    check_student(cache.fingerprint, batches.tokenizer)
    model.model.vision_tower.requires_grad_(False)
    distillation = CachedDistillation(cache)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    losses = []
    for keys in steps:
        inputs = batches.make(keys, ["response"], cache)
        labels = inputs.pop("labels")
        hidden = model.base_model(**inputs).last_hidden_state
        targets = cache.targets([(key, "response") for key in keys])
        output = distillation(hidden, lm_head_of(model), labels, targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses


if __name__ == "__main__":
    student, data, cache = read_paths("plain_loop", "STUDENT", "SET", "CACHE")
    keys = [key for key, _ in open_cache(cache).items()]
    steps = [keys[start : start + 16] for start in range(0, len(keys), 16)][:10]
    for number, loss in enumerate(train(student, data, cache, steps, 1e-3), start=1):
        print(f"step {number}: loss {loss:.4f}")
