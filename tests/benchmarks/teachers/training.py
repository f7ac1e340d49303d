"""Train one student on every target alike: same start, same contexts, same order.

Shape suffixes: N contexts in a pool, B contexts in a step, C numbers in a context, V ids.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.losses.cached_distillation import prior_of
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.tail_estimators import TailPrior, choose_tail
from llavamod_offline.losses.targets import SparseTargets
from teacher_cache.config import Preset
from teacher_cache.read.reader import TeacherCache
from tests.benchmarks.teachers.capture import capture
from tests.benchmarks.teachers.rivals import Kept, Rival, target_gradient
from tests.benchmarks.teachers.tasks import SoftMax, Task
from tests.benchmarks.teachers.worlds import Rows, World

HELD_OUT = 2_000
_WARM_STEPS = 150
_NEAR_RATE = 0.3


@dataclass(frozen=True)
class Regime:
    """How a student is trained: `steps` of `scale` times the task's batch.

    `pool`: how many batches of contexts there are; None: fresh ones at every step. `near`: start from a student trained
    on full distributions.
    """

    steps: int
    scale: int = 1
    pool: int | None = None
    near: bool = False


@dataclass(frozen=True)
class Trained:
    """A trained student: held-out KL(teacher ‖ student) in nats, and the bytes per position that it learnt from."""

    kl: float
    bytes_per_position: float


@dataclass(frozen=True)
class _Reading:
    """One way to read one cache, whose records are `targets`."""

    targets: SparseTargets
    bytes_per_position: float
    tail: TailEstimator
    prior: TailPrior | None


def train_all(
    task: Task,
    regime: Regime,
    *,
    temperature: float,
    seed: int,
    presets: Mapping[str, Preset],
    rivals: Mapping[str, Rival],
    estimators: tuple[TailEstimator, ...] = (),
) -> dict[str, Trained]:
    """Train students on `dense`, on every rival, and on every preset with its default reading and with `estimators`."""
    generator = torch.Generator().manual_seed(seed)
    batches = regime.pool or regime.steps
    contexts = [task.contexts(task.batch * regime.scale, generator) for _ in range(batches)]
    log_probs = [task.log_probs(contexts_BC) for contexts_BC in contexts]
    labels = [torch.multinomial(each.exp(), 1, generator=generator)[:, 0] for each in log_probs]

    def rows(number: int) -> Rows:
        return Rows(log_probs[number], labels[number])

    world = World(task.name, task.vocab_size, batches, torch.zeros(0), rows)
    kept_at = {name: dataclasses.replace(preset, temperature=temperature) for name, preset in presets.items()}
    with tempfile.TemporaryDirectory() as folder:
        readings: dict[str, _Reading] = {}
        for name, cache in capture(world, kept_at, Path(folder)).items():
            readings |= _readings(name, cache, temperature, regime.steps / batches, estimators)
    kept = {name: [rival(each, temperature) for each in log_probs] for name, rival in rivals.items()}
    torch.manual_seed(seed)
    start = task.student()
    if regime.near:
        _warm_up(task, start, temperature, seed)
    students = {name: copy.deepcopy(start) for name in ("dense", *rivals, *readings)}
    optimizers = {name: _optimizer(student) for name, student in students.items()}
    order = torch.Generator().manual_seed(seed)
    for step, rows_B in enumerate(_rows(regime, len(contexts[0]), batches, order)):
        rate = task.rate * (_NEAR_RATE if regime.near else 1.0) * _cosine(step, regime.steps)
        contexts_BC, log_probs_BV = _taken(contexts, rows_B), _taken(log_probs, rows_B)
        for name, student in students.items():
            if name in readings:
                _learn(student, contexts_BC, readings[name], rows_B, temperature)
            else:
                rival_kept = None if name == "dense" else _taken_kept(kept[name], rows_B)
                _learn_dense(student, contexts_BC, log_probs_BV, rival_kept, temperature)
            _apply(optimizers[name], rate)
    sizes = {name: reading.bytes_per_position for name, reading in readings.items()}
    sizes |= {name: float(np.mean([each.bytes_per_position for each in kept[name]])) for name in rivals}
    held_NC = task.contexts(HELD_OUT, torch.Generator().manual_seed(10**6))
    held_NV = task.log_probs(held_NC)
    return {
        name: Trained(_held_out(student, held_NC, held_NV, temperature), sizes.get(name, math.nan))
        for name, student in students.items()
    }


def _readings(
    name: str, cache: TeacherCache, temperature: float, epochs: float, estimators: tuple[TailEstimator, ...]
) -> dict[str, _Reading]:
    """The default reading of a cache that is read `epochs` times, and those with other `estimators`."""
    default = choose_tail("forward_kl", temperature, sampled_at=cache.sampled_at, has_samples=cache.has_tail_samples)
    prior = prior_of(cache, epochs=epochs, swap=None, vocab_size=None) if default == "samples" else None
    targets = cache.targets([(key, "response") for key in sorted(cache.keys("response"))])
    others = {f"{name} {tail}": _Reading(targets, cache.bytes_per_position, tail, None) for tail in estimators}
    return {name: _Reading(targets, cache.bytes_per_position, default, prior), **others}


def _optimizer(student: SoftMax) -> torch.optim.Adam:
    return torch.optim.Adam([each for each in student.parameters() if each.requires_grad])


def _apply(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _rows(regime: Regime, batch: int, batches: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The contexts of every step, as row numbers: in order, or reshuffled for every pass."""
    for step in range(regime.steps):
        place = step % batches
        if place == 0:
            shuffled = torch.randperm(batch * batches, generator=generator)
        if regime.pool is None:
            yield torch.arange(step * batch, (step + 1) * batch)
        else:
            yield shuffled[place * batch : (place + 1) * batch]


def _taken(pieces: list[Tensor], rows_B: Tensor) -> Tensor:
    size = len(pieces[0])
    first = int(rows_B[0]) // size
    if len(rows_B) == size and int(rows_B[-1]) == int(rows_B[0]) + size - 1 and int(rows_B[0]) % size == 0:
        return pieces[first]
    return torch.stack([pieces[int(row) // size][int(row) % size] for row in rows_B])


def _taken_kept(pieces: list[Kept], rows_B: Tensor) -> Kept:
    tails = [piece.tail_N for piece in pieces]
    tail_N = None if tails[0] is None else _taken([tail for tail in tails if tail is not None], rows_B)
    ids_NK, probs_NK = (_taken([getattr(piece, name) for piece in pieces], rows_B) for name in ("ids_NK", "probs_NK"))
    return Kept(ids_NK, probs_NK, tail_N, pieces[0].bytes_per_position)


def _learn(student: SoftMax, contexts_BC: Tensor, reading: _Reading, rows_B: Tensor, temperature: float) -> None:
    terms = distillation_from_hidden(
        student(contexts_BC),
        student.head_VD,
        reading.targets.take(rows_B),
        tail=reading.tail,
        prior=reading.prior,
        temperature=temperature,
    )
    (terms.loss_sum / len(contexts_BC)).backward()


def _learn_dense(
    student: SoftMax, contexts_BC: Tensor, log_probs_BV: Tensor, kept: Kept | None, temperature: float
) -> None:
    logits_BV = student(contexts_BC) @ student.head_VD.T
    with torch.no_grad():
        q_BV = (logits_BV / temperature).softmax(-1)
        p_BV = (log_probs_BV / temperature).softmax(-1)
        gradient_BV = q_BV - p_BV if kept is None else target_gradient(kept, q_BV)
    logits_BV.backward(gradient_BV * (temperature / len(contexts_BC)))


def _warm_up(task: Task, student: SoftMax, temperature: float, seed: int) -> None:
    """Train on the full distributions of contexts that are used nowhere else."""
    generator = torch.Generator().manual_seed(10**7 + seed)
    optimizer = _optimizer(student)
    for step in range(_WARM_STEPS):
        contexts_BC = task.contexts(task.batch, generator)
        _learn_dense(student, contexts_BC, task.log_probs(contexts_BC), None, temperature)
        _apply(optimizer, task.rate * _cosine(step, _WARM_STEPS))


@torch.no_grad()
def _held_out(student: SoftMax, contexts_NC: Tensor, log_probs_NV: Tensor, temperature: float) -> float:
    total = 0.0
    for contexts_BC, log_probs_BV in zip(contexts_NC.split(500), log_probs_NV.split(500), strict=True):
        log_q_BV = (student(contexts_BC) @ student.head_VD.T / temperature).log_softmax(-1)
        log_p_BV = (log_probs_BV / temperature).log_softmax(-1)
        total += float((log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(dtype=torch.float64))
    return total / len(contexts_NC)
