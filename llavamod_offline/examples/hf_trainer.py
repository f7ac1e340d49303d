"""Distil a student from a cache with HF Trainer.

    make demo ARGS=--quick && pip install -c constraints.txt accelerate
    python -m llavamod_offline.examples.hf_trainer runs/demo/train/align/student runs/demo/sets/general \
        runs/demo/cache/general runs/hf_trainer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from llavamod_offline.examples.batches import Batches
from llavamod_offline.examples.usage import read_paths
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.losses import CachedDistillation
from teacher_cache import check_student, open_cache


def train(student: Path, data: Path, cache_path: Path, keys: Sequence[str], **settings: Any) -> list[float]:
    """Train on samples by key, with `settings` of `TrainingArguments`; return the logged losses."""
    cache, batches, model = open_cache(cache_path), Batches(student, data), load_llava(student)
    check_student(cache.fingerprint, batches.tokenizer)
    model.model.vision_tower.requires_grad_(False)
    CachedDistillation(cache).attach(model)  # model(**inputs, labels=…, targets=…) now returns the distillation loss

    def collate(chosen: list[str]) -> dict[str, Any]:
        targets = cache.targets([(key, "response") for key in chosen])
        return {**batches.make(chosen, ["response"], cache), "targets": targets}

    arguments = TrainingArguments(remove_unused_columns=False, logging_steps=1, report_to=[], **settings)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=list(keys))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    student, data, cache, output = read_paths("hf_trainer", "STUDENT", "SET", "CACHE", "OUTPUT")
    keys = [key for key, _ in open_cache(cache).items()]
    settings = {"output_dir": str(output), "per_device_train_batch_size": 16, "learning_rate": 1e-3, "max_steps": 10}
    train(student, data, cache, keys, **settings)
