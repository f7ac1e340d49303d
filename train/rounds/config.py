"""The settings of `llavamod-offline rounds`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llavamod_offline.config import InputPath, raise_problems

RoundLoss = Literal["reverse_kl", "forward_kl", "policy_gradient"]
# Settings of the commands that the rounds fill in themselves.
_PLACES = ("output", "output_set", "data", "data.set", "cache.path", "teacher", "student.checkpoint")
_OWNED = {
    "write": (
        *("generate.temperature", "generate.max_new_tokens", "generate.seed", "generate.round", "generate.key_suffix"),
        "generate.capture",
    ),
    "score": (),
    "train": ("steps", "epochs", "seed", "loss.kind", "loss.divergence", "loss.positions"),
}


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of write, score and train, each with a set, a cache and a run of its own below `output`."""

    prompts: InputPath = "???"
    """The set whose prompts the student answers in every round: a folder that llavamod-offline pack or index made."""
    holdout: InputPath = "???"
    """A set of other prompts, on which the student is measured before the first round and after each round."""
    teacher: InputPath = "???"
    """Folder or Hub id of the teacher's checkpoint."""
    student: InputPath = "???"
    """Folder or Hub id of the initial student, such as one trained in a mimic stage."""
    output: str = "???"
    """Folder of the rounds; rerun the same command to resume."""
    rounds: int = 2
    """Number of rounds."""
    steps: int = 100
    """Optimiser steps per round."""
    loss: RoundLoss = "reverse_kl"
    """What the student learns on its own answers: a divergence from the teacher's recorded distributions, or
    policy_gradient, for which the teacher's log-probs of the written tokens are enough."""
    stage: Literal["mimic_dense", "mimic_sparse"] = "mimic_dense"
    """Recipe for the student: mimic_dense, or mimic_sparse if the student is already a mixture of experts."""
    temperature: float = 1.0
    """Sampling temperature of the student's answers in each round. The student is always measured at temperature 1."""
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens; longer ones are listed as rejected and not learnt from."""
    batch_size: int = 16
    """Sequences per forward pass of writing and scoring."""
    seed: int = 0
    """Seed for writing and training; each round adds its number."""
    write: list[str] = field(default_factory=list)
    """Further settings for each `cache-teacher generate`, such as [generate.turns=all]; generate.* settings are not
    used when the student is measured. Quote a setting that contains brackets: ['generate.stop=[END]']."""
    score: list[str] = field(default_factory=list)
    """Further settings for each `cache-teacher run`, such as [capture.preset=compact, engine.kind=vllm]; capture.*
    settings are not used when the student is measured."""
    train: list[str] = field(default_factory=list)
    """Further settings for each `train-student`, such as [optim.lr=1e-5, 'trainable=[projector,text]']."""
    trainer: str = "train-student"
    """The command that trains, such as "torchrun --nproc-per-node 8 --no-python train-student"."""
    benchmarks: InputPath | None = None
    """Folder with the benchmarks' files (eval-student's root), to score each round's student on; null: none."""
    tasks: list[str] = field(default_factory=list)
    """Benchmarks to score, such as [gqa, pope]; none that needs a judge."""

    def __post_init__(self) -> None:
        raise_problems(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield one line for each problem, naming the key to change."""
        for name in ("rounds", "steps", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}: must be at least 1"
        if not 0 <= self.temperature < float("inf"):
            yield f"temperature is {self.temperature:g}: must be 0 or more"
        if self.loss == "policy_gradient" and self.temperature == 0:
            yield "temperature: policy_gradient needs sampled answers: set it above 0, or loss to a divergence"
        if (self.benchmarks is None) != (not self.tasks):
            yield "benchmarks: name both benchmarks and tasks, or neither"
        if Path(self.prompts) == Path(self.holdout):
            yield "holdout: is the same set as prompts: name another"
        try:
            if not shlex.split(self.trainer):
                yield "trainer: is empty: name a command, such as train-student"
        except ValueError as error:
            yield f"trainer: '{self.trainer}' is not a command line ({error}): close its quotes"
        for name, owned in _OWNED.items():
            for setting in getattr(self, name):
                key, equals, _ = setting.partition("=")
                if not equals or key != key.strip():
                    yield f"{name}: '{setting}' is not a setting: write KEY=VALUE"
                elif key in (*_PLACES, *owned):
                    yield f"{name}: '{key}' is decided by the rounds: remove it"
