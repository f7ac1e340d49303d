"""A slow, obvious trainer: sample by sample through transformers' own forward pass, plain AdamW, no engine.

Shape suffixes: T tokens of a sequence, N supervised ones, V ids, D hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.models.checkpoint import load_tokenizer
from train.metrics import METRICS_NAME


@dataclass(frozen=True)
class Answer:
    """The log-probs [N, V] at one sequence's supervised positions, the tokens there, and all log-probs, [T, V].

    `logits_TV`, `hidden_TD` and `ids_T` are of all positions, `rows_N` those that predict supervised tokens.
    """

    log_probs_NV: Tensor
    target_ids_N: Tensor
    all_log_probs_TV: Tensor
    logits_TV: Tensor
    hidden_TD: Tensor
    ids_T: Tensor
    rows_N: Tensor

    @property
    def target_log_probs_N(self) -> Tensor:
        return self.log_probs_NV.gather(1, self.target_ids_N[:, None])[:, 0]


class Reader:
    """Runs a model on single samples of a set."""

    def __init__(self, folder: Path, data: Path, template: str = "qwen") -> None:
        tokenizer = load_tokenizer(folder)
        self.model: Any = load_llava(folder)
        self.samples = SampleSet.open(data)
        self.encoder = sequence_encoder(folder, tokenizer, get_template(template), 2048)
        self.images = ImagePreprocessor.from_checkpoint(folder, "pad")
        self.vocab = len(tokenizer)

    def step_samples(self, step: int, size: int) -> list[Sample]:
        """The samples of a step's global batch."""
        order = Order(len(self.samples), seed=0, batch_size=size)
        return [self.samples.read(row) for row in order.batch(step).tolist()]

    def answer(self, sample: Sample, role: str = "response") -> Answer:
        """Run one forward pass over one sequence; ids beyond the tokenizer's get no probability."""
        sequence = self.encoder.encode(sample, role)
        ids_1T = torch.from_numpy(sequence.input_ids_T)[None]
        pixels = [torch.from_numpy(self.images.pixels(image, name=sample.key)) for image in sample.images]
        output = self.model(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            pixel_values=torch.stack(pixels) if pixels else None,
            output_hidden_states=True,
        )
        rows_N = torch.from_numpy(sequence.supervised_N) - 1
        logits_TV = output.logits[0, :, : self.vocab]
        log_probs_TV = logits_TV.log_softmax(-1)
        targets_N = torch.from_numpy(sequence.target_ids_N)
        hidden_TD = output.hidden_states[-1][0]
        return Answer(log_probs_TV[rows_N], targets_N, log_probs_TV, logits_TV, hidden_TD, ids_1T[0], rows_N)

    def freeze_all_but(self, *parts: str) -> list[torch.nn.Parameter]:
        """Make only the parameters trainable whose names contain one of `parts`; return them."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def train_plainly(
    trained: list[torch.nn.Parameter], loss_of_step: Callable[[int], Tensor], *, steps: int, rate: float
) -> tuple[list[float], list[float]]:
    """Train by AdamW with clipping at 1 and a cosine to 0 without warm-up; return losses and norms before clipping."""
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of_step(step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Read a run's logged steps."""
    return [json.loads(line) for line in (output / METRICS_NAME).read_text().splitlines()]
