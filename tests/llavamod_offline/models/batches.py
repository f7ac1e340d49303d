"""Batches of tensors, as a collator makes them: padded on the right, images in the order of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.families.llava.checkpoint import sequence_encoder
from llavamod_offline.models.checkpoint import load_tokenizer
from tests.tiny import tiny_samples


@dataclass(frozen=True)
class Batch:
    """Shape suffixes: B sequences, T tokens, I images."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    pixel_values_ICHW: Tensor


def make_batch(folder: Path, rows: list[int], seed: int = 0) -> Batch:
    """Some of the tiny samples as a batch, with random pixels (sample 3 has no image, 5 has two and two turns)."""
    encoder = sequence_encoder(folder, load_tokenizer(folder), get_template("qwen"), 512)
    samples = [tiny_samples(8)[row] for row in rows]
    sequences = [encoder.encode(sample, "response") for sample in samples]
    longest = max(len(sequence.input_ids_T) for sequence in sequences)
    input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids_BT[row, : len(sequence.input_ids_T)] = torch.from_numpy(sequence.input_ids_T)
        attention_mask_BT[row, : len(sequence.input_ids_T)] = 1
    generator = torch.Generator().manual_seed(seed)
    images = sum(len(sample.images) for sample in samples)
    return Batch(input_ids_BT, attention_mask_BT, torch.randn(images, 3, 24, 24, generator=generator))
