"""Preference training with TRL's DPO trainer; the reference log-probs are the cached teacher's, exported for TRL.

    make demo ARGS=--quick && pip install -c constraints.txt trl datasets
    cache-teacher export runs/demo/cache/preference --format trl --output reference.parquet
    python -m llavamod_offline.examples.trl_dpo runs/demo/train/mimic_dense/student runs/demo/sets/preference \
        runs/demo/cache/preference reference.parquet runs/trl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from llavamod_offline.data.encode.tokenize import UNSUPERVISED
from llavamod_offline.examples.batches import Batches
from llavamod_offline.examples.usage import read_paths
from llavamod_offline.families.llava.checkpoint import load_llava
from teacher_cache import check_student, open_cache


class CachedReferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """Take reference log-probs from the data set's columns, so that no reference model is loaded or run."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # the collator tokenizes

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # columns `ref_chosen_logps` and `ref_rejected_logps`


def train(student: Path, data: Path, cache_path: Path, reference: Path, **settings: Any) -> list[float]:
    """Train on the pairs of an export, with `settings` of `DPOConfig`; return the logged losses."""
    cache, batches, model = open_cache(cache_path), Batches(student, data), load_llava(student)
    check_student(cache.fingerprint, batches.tokenizer)
    model.model.vision_tower.requires_grad_(False)

    def collate(pairs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = batches.make([pair["key"] for pair in pairs], ["chosen", "rejected"], cache)
        inputs["completion_mask"] = (inputs.pop("labels") != UNSUPERVISED).long()
        names = ("ref_chosen_logps", "ref_rejected_logps")
        return inputs | {name: torch.tensor([pair[name] for pair in pairs]) for name in names}

    pairs = Dataset.from_parquet(str(reference), keep_in_memory=True)
    own = {"precompute_ref_log_probs": True, "remove_unused_columns": False, "logging_steps": 1, "report_to": []}
    arguments: dict[str, Any] = {"args": DPOConfig(**own, **settings), "train_dataset": pairs, "data_collator": collate}
    trainer = CachedReferenceTrainer(model, processing_class=batches.tokenizer, **arguments)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    names = ("STUDENT", "SET", "CACHE", "REFERENCE.parquet", "OUTPUT")
    student, data, cache, reference, output = read_paths("trl_dpo", *names)
    gpu = torch.cuda.is_available()
    settings = {"output_dir": str(output), "per_device_train_batch_size": 8, "max_steps": 10}
    train(student, data, cache, reference, learning_rate=5e-5, bf16=gpu, use_cpu=not gpu, **settings)
