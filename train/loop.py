"""The loop: one optimiser step after another, each the mean over all units of its global batch.

A step's units (supervised positions, or pairs) and tokens are counted over all micro-batches and processes before the
first backward pass, and every micro-batch's sums are divided by these counts: each unit has equal weight, however it is
batched. DeepSpeed averages gradients over processes, so the loss is multiplied by their number first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.errors import LlavaModError, ModelError
from llavamod_offline.models.routing import is_sparse, random_routing
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import noted
from train.checkpoint import Progress
from train.data.batches import TrainBatch
from train.engine.deepspeed_engine import World, apply_gradients
from train.metrics import MetricsLog
from train.stages.build import Objective
from train.stages.loss_sums import LossSums, StepSums, combine, spread_entry

Entry = dict[str, Any]


@dataclass(frozen=True)
class LoopSettings:
    """The loop's settings; 0 for `save_steps` or `eval_steps` means never.

    `samples`: the number in an epoch, of which a step takes `batch_size`. `part_scales`: for the log, the rates of
    parts that have their own, each divided by that of the other parts.
    """

    steps: int
    micro_steps: int
    samples: int
    batch_size: int
    seed: int
    log_steps: int
    save_steps: int
    eval_steps: int
    learning_rate: Callable[[int], float]
    part_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopEnd:
    """How the loop ended: after the last step, or `stopped` by a signal."""

    progress: Progress
    stopped: bool


def run_steps(
    engine: Any,
    objective: Objective,
    micro_batches: Iterator[TrainBatch],
    *,
    settings: LoopSettings,
    progress: Progress,
    world: World,
    log: MetricsLog | None,
    bar: ProgressBar,
    save: Callable[[Progress], None],
    evaluate: Callable[[], Entry],
    at_end: Callable[[Sequence[TrainBatch]], Entry],
) -> LoopEnd:
    """Train from `progress` to the last step; `micro_batches` must start at the next step.

    `evaluate` and `at_end`, which is given the last step's micro-batches, add to the log entry.
    SIGINT or SIGTERM ends the loop after the current step, with a checkpoint; so does a sample that cannot be used.
    Errors: `ModelError` naming step and samples if a loss or a gradient is not finite; no checkpoint is saved.
    """
    began_at = saved = progress.step
    with noted("saving a checkpoint after this step") as stop:
        for step in range(progress.step, settings.steps):
            began = time.perf_counter()
            micros, failure = _next(micro_batches, settings.micro_steps)
            waited = time.perf_counter() - began
            counts = _step_counts(objective, micros, stop.is_set() or failure is not None, world)
            if counts.stop:
                if progress.step > saved:
                    save(progress)
                if failure is not None:
                    raise failure
                return LoopEnd(progress, stopped=True)
            torch.manual_seed(_step_seed(settings.seed, step, world.rank))
            parts = _backward(engine, objective, micros, counts, world)
            sums = combine(parts, counts.units, counts.tokens, world)
            _check_finite(sums.loss, step, parts, micros, world)
            rate = settings.learning_rate(step)
            norm = apply_gradients(engine, rate)
            if not math.isfinite(norm):
                raise ModelError(_not_finite("gradient", norm, step, micros))
            seconds = time.perf_counter() - began
            now = step + 1
            entry = _entry(sums, now, rate, norm, counts, seconds, waited)
            entry["epoch"] = now * settings.batch_size / max(settings.samples, 1)
            if settings.part_scales:
                entry["part_lr"] = {part: rate * scale for part, scale in settings.part_scales.items()}
            done = now == settings.steps
            evaluated = bool(settings.eval_steps) and (done or now % settings.eval_steps == 0)
            if evaluated:
                entry |= evaluate()
            if done:
                entry |= at_end(micros)
            progress = Progress(
                now,
                progress.tokens + counts.tokens,
                progress.positions + counts.positions,
                progress.seconds + seconds,
                entry,
            )
            if log is not None and (done or evaluated or step == 0 or progress.step % settings.log_steps == 0):
                log.write(entry)
            bar.advance(note=f"loss {sums.loss:.4f}, {entry['tokens_per_s']:,.0f} tokens/s")
            if settings.save_steps and not done and progress.step % settings.save_steps == 0:
                save(progress)
                saved = progress.step
        stops = torch.tensor([float(stop.is_set())], device=world.device)
        if began_at < progress.step and float(world.sum(stops)[0]):
            save(progress)
            return LoopEnd(progress, stopped=True)
    return LoopEnd(progress, stopped=False)


def evaluate_loss(engine: Any, objective: Objective, micros: Sequence[TrainBatch], world: World) -> Entry:
    """Compute the loss and its parts over held-out micro-batches, as log entries named `holdout_…`."""
    sums = _evaluate(engine, objective, micros, world)
    means = sums.means | {name: float(value) for name, value in sums.token_means.items() if not value.ndim}
    return {"holdout_loss": sums.loss, **{f"holdout_{name}": value for name, value in means.items()}}


def compare_routing(engine: Any, objective: Objective, micros: Sequence[TrainBatch], world: World) -> Entry:
    """Compute a sparse student's loss, without the balance loss, with its own and with random routing, as log entries.

    Empty for a dense student.
    """
    if not is_sparse(engine.module):
        return {}
    own = _evaluate(engine, objective, micros, world, balance=False)
    with random_routing(engine.module, seed=world.rank):
        other = _evaluate(engine, objective, micros, world, balance=False)
    return {"own_routing_loss": own.loss, "random_routing_loss": other.loss}


def _evaluate(
    engine: Any, objective: Objective, micros: Sequence[TrainBatch], world: World, *, balance: bool = True
) -> StepSums:
    """Sum the losses over micro-batches in evaluation mode."""
    counts = _step_counts(objective, micros, False, world)
    engine.eval()
    with torch.no_grad():
        shared, features = _shared(engine, objective, micros, world)
        parts = [engine(batch.to(world.device), shared, own)[1] for batch, own in zip(micros, features, strict=True)]
    engine.train()
    if not balance:
        parts = [replace(part, token_loss=None) for part in parts]
    return combine(parts, counts.units, counts.tokens, world)


def _next(micro_batches: Iterator[TrainBatch], count: int) -> tuple[list[TrainBatch], LlavaModError | None]:
    """Take a step's micro-batches, or the error of a sample that cannot be used."""
    try:
        return list(islice(micro_batches, count)), None
    except LlavaModError as error:
        return [], error


@dataclass(frozen=True)
class _Counts:
    """Counts over a step's global batch, and whether any process was told to stop.

    `positions`: how many of the `recorded` ones the loss covers.
    """

    units: float
    tokens: int
    positions: int
    recorded: int
    stop: bool


def _step_counts(objective: Objective, micros: Sequence[TrainBatch], stop: bool, world: World) -> _Counts:
    local = (
        float(sum(objective.count(batch) for batch in micros)),
        float(sum(batch.batch.tokens for batch in micros)),
        float(sum(objective.positions(batch) for batch in micros)),
        float(sum(batch.positions for batch in micros)),
        float(stop),
    )
    summed = world.sum(torch.tensor(local, dtype=torch.float64, device=world.device))
    units, tokens, positions, recorded, stops = summed.tolist()
    units = units or 1.0  # all positions of a step may be left out
    return _Counts(units, int(tokens), int(positions), int(recorded), stops > 0)


def _backward(
    engine: Any, objective: Objective, micros: Sequence[TrainBatch], counts: _Counts, world: World
) -> list[LossSums]:
    """Accumulate the gradient of the step's mean loss, without changing weights."""
    shared, features = _shared(engine, objective, micros, world)
    parts = []
    for place, batch in enumerate(micros):
        last = place == len(micros) - 1
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        loss, sums = engine(batch.to(world.device), shared, features[place], units=counts.units, tokens=counts.tokens)
        engine.backward(loss * world.size, scale_wrt_gas=False)
        if not last:
            engine.step()  # only advances to the next micro-batch: weights change at the boundary
        parts.append(sums.detach())
    return parts


def _shared(
    engine: Any, objective: Objective, micros: Sequence[TrainBatch], world: World
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute what a step's losses share, and each micro-batch's vision-tower features if that needed them.

    Does nothing for a step of a single micro-batch, whose loss computes both itself.
    """
    nothing: list[Tensor | None] = [None] * len(micros)
    if len(micros) == 1 and world.size == 1:
        return None, nothing
    if objective.totals is not None:
        totals = world.sum(torch.stack([objective.totals(batch) for batch in micros]).sum(0).to(world.device))
        return totals.cpu(), nothing
    if objective.look_ahead is None or objective.share is None:
        return None, nothing
    with torch.no_grad():
        ahead = [engine(batch.to(world.device), None, ahead=True) for batch in micros]
        return objective.share([one.value for one in ahead], world), [one.features for one in ahead]


def _entry(
    sums: StepSums, step: int, rate: float, norm: float, counts: _Counts, seconds: float, waited: float
) -> Entry:
    entry: Entry = {"step": step, "loss": sums.loss, **sums.means, "lr": rate, "grad_norm": norm}
    entry |= {
        "positions": counts.positions,
        "tokens": counts.tokens,
        "tokens_per_s": counts.tokens / max(seconds, 1e-9),
        "seconds": seconds,
        "data_wait_share": waited / max(seconds, 1e-9),
    }
    if counts.positions < counts.recorded:
        entry["covered_share"] = counts.positions / counts.recorded
    entry |= {name: value.tolist() for name, value in sums.token_means.items()}
    spreads = {name: values[~values.isnan()] for name, values in sums.spreads.items()}
    return entry | {name: spread_entry(values) for name, values in spreads.items() if len(values)}


def _check_finite(
    loss: float, step: int, parts: Sequence[LossSums], micros: Sequence[TrainBatch], world: World
) -> None:
    if math.isfinite(loss):
        return
    guilty = [batch for batch, part in zip(micros, parts, strict=True) if not bool(torch.isfinite(part.share(1, 1)))]
    if not guilty and world.size > 1:
        raise ModelError(f"step {step + 1}: the loss is {loss} in another process: see its error for the samples")
    raise ModelError(_not_finite("loss", loss, step, guilty or micros))


def _not_finite(what: str, value: float, step: int, micros: Sequence[TrainBatch]) -> str:
    keys = list(dict.fromkeys(key for batch in micros for key in batch.batch.keys))
    named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    return (
        f"step {step + 1}: the {what} is {value} on samples {named}: lower optim.lr, set optim.grad_clip, or pack "
        "the set again without these samples, and rerun to resume from the last checkpoint"
    )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Derive a seed for each step and process, so that checkpoints need no random state."""
    return hash((seed, step, rank)) % 2**63
