"""Measure a student on a set that it was not trained on: how far it is from the teacher, and from the answers.

Shape suffixes: N positions, C positions of a chunk, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import DataError
from llavamod_offline.families.folder import longrope_from
from llavamod_offline.losses.divergence import forward_kl
from llavamod_offline.losses.targets import SparseTargets
from llavamod_offline.models.checkpoint import vocabulary_size
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.models.lm_head import float32_products, lm_head_of
from llavamod_offline.progress import ProgressBar
from train.config import LossConfig, MeasureConfig, Stage, StudentConfig, TrainConfig
from train.config.train import BatchConfig, DataConfig
from train.engine.deepspeed_engine import World
from train.setup import prepare
from train.stages.student_pass import StudentPass
from train.student.source import is_sparse_checkpoint

BINS = 15  # of confidence, as in Guo et al., arXiv 1706.04599
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class Measurement:
    """Means over the positions that predict answers; the teacher's figures are None without a cache.

    `cross_entropy`: against the set's own tokens, in nats. `accuracy`: the share of these tokens that are the student's
    most likely one. `calibration_error`: the mean gap between accuracy and confidence over `BINS` bins of confidence
    (ECE). `kl`: KL(teacher ‖ student) in nats: exact if the cache holds all ids, an unbiased estimate if it has tail
    samples, else a lower bound. For a mixture of teachers it is none of these (FORMAT.md, section 13): tails are read
    as one bucket, and a student that equals the mixture has a figure above 0.
    `entropy`: the teacher's; none for a cache captured at another temperature, whose `kl` is a lower bound.
    `agreement`: the share of positions where both have the same most likely token.
    """

    samples: int
    positions: int
    cross_entropy: float
    accuracy: float
    calibration_error: float
    kl: float | None = None
    entropy: float | None = None
    agreement: float | None = None


def measure(config: MeasureConfig) -> Measurement:
    """Measure a student on all samples of a set.

    Errors: a `LlavaModError` that names the setting to change, as from `train-student`.
    """
    world = World(0, 1, 1, pick_device(config.device))
    setup = prepare(_as_training(config), world)
    student = setup.student.to(device=world.device, dtype=setup.dtype).eval()
    head = lm_head_of(student)
    sums = _Sums(vocabulary_size(setup.family.encoder.tokenizer, head.rows), world.device)
    places = list(range(len(setup.joined.rows)))
    longest = longrope_from(student.config)  # beyond it, positions depend on the longest sequence of a batch
    alone = not setup.family.batches or (longest is not None and config.max_length > longest)
    size = 1 if alone else config.batch_size
    batches = [places[i : i + size] for i in range(0, len(places), size)]
    forward = StudentPass(setup.family.forward)
    with torch.no_grad(), ProgressBar("measure", len(places), "sample") as bar:
        for batch in setup.loader.batches(batches):
            moved = batch.to(world.device)
            hidden_ND, _ = forward.predicting_states(student, moved)
            answers_A = (moved.batch.target_ids_N != NO_TARGET).nonzero()[:, 0]
            for rows_C in answers_A.split(max(1, _CHUNK_LOGITS // head.rows)):
                logits_CV = head.finish_(float32_products(hidden_ND[rows_C], head.weight_VD))
                targets = None if moved.targets is None else moved.targets.take(rows_C)
                sums.add(logits_CV, moved.batch.target_ids_N[rows_C], targets)
            bar.advance(batch.samples)
    return sums.measurement(len(places))


def _as_training(config: MeasureConfig) -> TrainConfig:
    """Return the settings of a training run with the inputs of the measurement; it never takes a step."""
    sparse = is_sparse_checkpoint(checkpoint_folder(config.student.checkpoint))
    distils = config.cache.path is not None
    stage: Stage = "sft" if not distils else "mimic_sparse" if sparse else "mimic_dense"
    return TrainConfig(
        stage=stage,
        output="",  # nothing is written
        data=DataConfig(set=config.data.set, too_long=config.data.too_long),
        cache=config.cache,
        student=StudentConfig(checkpoint=config.student.checkpoint, kind="sparse" if sparse else "dense"),
        template=config.template,
        image_aspect=config.image_aspect,
        max_length=config.max_length,
        loss=LossConfig(kind="only_kd", tail="bucket") if distils else LossConfig(),
        batch=BatchConfig(1, 1),
        workers=config.workers,
    )


class _Sums:
    """Sums over positions, accumulated chunk by chunk."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._positions = self._distilled = 0
        self._cross_entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._bins_3B = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # positions, hits, confidence
        self._metrics: dict[str, Tensor] = {}
        self._sampled_at = 1.0

    def add(self, logits_CV: Tensor, target_ids_C: Tensor, targets: SparseTargets | None) -> None:
        """Add a chunk of positions."""
        self._positions += len(target_ids_C)
        if targets is not None:
            self._sampled_at = targets.sampled_at
            self._distilled += len(targets)
            for name, value in forward_kl(logits_CV, targets).metrics.items():
                self._metrics[name] = self._metrics.get(name, 0.0) + value.double()
        log_probs_CV = logits_CV[:, : self._vocab_size].log_softmax(-1)
        self._cross_entropy -= log_probs_CV.gather(1, target_ids_C[:, None].long()).sum(dtype=torch.float64)
        best_C, choice_C = log_probs_CV.max(-1)
        confidence_C = best_C.exp().double()
        bin_C = (confidence_C * BINS).long().clamp(max=BINS - 1)
        hits_C = (choice_C == target_ids_C).double()
        for row, values_C in enumerate((torch.ones_like(hits_C), hits_C, confidence_C)):
            self._bins_3B[row].index_add_(0, bin_C, values_C)

    def measurement(self, samples: int) -> Measurement:
        """The means. Errors: `DataError` if there are no positions."""
        if not self._positions:
            raise DataError("data.set: none of its samples has an answer to measure: choose another set")
        _, hits_B, confidence_B = self._bins_3B
        means = {name: float(value) / self._distilled for name, value in self._metrics.items()}
        return Measurement(
            samples,
            self._positions,
            float(self._cross_entropy) / self._positions,
            float(hits_B.sum()) / self._positions,
            float((hits_B - confidence_B).abs().sum()) / self._positions,
            means.get("kl"),
            means.get("entropy") if self._sampled_at == 1 else None,  # else that of another temperature
            means.get("top1_agreement"),
        )
