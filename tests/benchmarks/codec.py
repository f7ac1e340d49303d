"""What a cache costs and what it is worth: total bytes per position, against the error of the gradient that it gives.

    python -m tests.benchmarks.codec [--quick] [--model FOLDER] [--student early-exit:N] [--teachers NAMES] --json FILE

Teachers: the 4-gram model of `teachers/ngram.py`, the toy teacher, and with --model any causal language model, on fewer
positions. `--teachers ngram,toy` or `model` selects some; rows of the others already in FILE stay.

Students are on the line from the teacher p to its unigram u, q ∝ p^w·u^(1−w): `near` w = 0.9, `mid` 0.5, `fresh` 0; and
a real one (`start`): for the toy teacher one at the beginning of its training, for --model the one that --student
names: a folder, or the model itself exiting after layer N.

Errors are relative: ‖Σ (q − p̂) − Σ (q − p)‖ / ‖Σ (q − p)‖ over about 4,096 positions, T · (q − p̂) at a temperature T:
the gradient of an output bias and, with hidden states h, of the LM head's weight, Σ (q − p̂) hᵀ (for --model, h
projected to 16 numbers: 7 GB and 20 minutes of one core at V = 262,144). Our gradients are those of the losses on
records that were written and read back. `kl`: KL(full ‖ p̂) for the student `mid`, infinite where p̂ drops ids. The
error of a single step does not decide how good a run's student becomes: bias accumulates over the steps, noise does
not.

`floor`: the bytes that an ideal coder of single symbols would need for the ids and numbers that a cache holds.

Shape suffixes: N positions, V ids, D hidden size, H top-k entries of all positions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.chunk_gradients import divergence_in_place, zero_metrics
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.tail_estimators import prepare_targets
from llavamod_offline.losses.targets import SparseTargets
from teacher_cache.config import PRESETS, Preset
from teacher_cache.read.reader import TeacherCache
from tests.benchmarks.form import Row, finish, parse_arguments
from tests.benchmarks.teachers.capture import capture
from tests.benchmarks.teachers.floor import floor_bytes
from tests.benchmarks.teachers.rivals import RIVALS, target_gradient
from tests.benchmarks.teachers.worlds import World, causal_world, ngram_world, toy_world

NAME = "codec"
TEMPERATURES = (1.0, 2.0)
STUDENTS = {"near": 0.9, "mid": 0.5, "fresh": 0.0}
ESTIMATORS: tuple[TailEstimator, ...] = ("samples", "bucket", "renormalised")
MEASURED = ("small", "compact", "standard")
DEFAULT: TailEstimator = "samples"


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "", {"model": "", "student": "", "teachers": ""})
    options, quick = arguments.options, arguments.quick
    sequences, measured = (6, 2) if quick else (100, 10)
    few, few_measured = (4, 1) if quick else (60, 5)
    makers: dict[str, tuple[Callable[[], World], int]] = {
        "ngram": (lambda: ngram_world(sequences, *(1_000, 60) if quick else ()), measured),
        "toy": (lambda: toy_world(sequences), measured),
    }
    if options["model"]:
        makers["model"] = (lambda: causal_world(options["model"], few, options["student"]), few_measured)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    positions: dict[str, int] = {}
    chosen = options["teachers"].split(",") if options["teachers"] else [*makers]
    if unknown := [name for name in chosen if name not in makers]:
        raise SystemExit(f"--teachers: '{unknown[0]}' is not among {', '.join(makers)}; 'model' needs --model FOLDER")
    for maker, measured in [makers[name] for name in chosen]:
        world = maker()
        positions[world.name] = 100 * measured
        with tempfile.TemporaryDirectory() as folder:
            presets = {(name, T): captured_for(PRESETS[name], T) for name in MEASURED for T in TEMPERATURES}
            caches = capture(world, presets, Path(folder))
            found = measure(world, caches, measured)
            sizes = {place: (cache.bytes_per_position, floor_bytes(cache)) for place, cache in caches.items()}
        rows += table(world, found, sizes)
        suffix = "" if world.name == "ngram" else f"_{world.name}"
        ratios |= {f"{name}{suffix}": value for name, value in ratios_of(found, sizes).items()}
    settings: dict[str, Any] = {name: dataclasses.asdict(PRESETS[name]) for name in MEASURED}
    if arguments.json_file and arguments.json_file.exists():
        before = json.loads(arguments.json_file.read_text())
        if before["settings"]["quick"] == quick:
            rows, ratios, positions = with_others(before, rows, ratios, positions)
    finish(NAME, arguments, settings={"positions": positions, **settings}, rows=rows, ratios=ratios)


def with_others(
    before: dict[str, Any], rows: list[Row], ratios: dict[str, float], positions: dict[str, int]
) -> tuple[list[Row], dict[str, float], dict[str, int]]:
    """Add an earlier result's rows and ratios of teachers that were not measured this time."""
    teachers = before["settings"]["positions"]

    def teacher(ratio: str) -> str:  # ratios of the 4-gram model have no suffix
        return next((name for name in teachers if ratio.endswith(f"_{name}")), "ngram")

    kept = [row for row in before["rows"] if row["teacher"] not in positions]
    others = {name: value for name, value in before["ratios"].items() if teacher(name) not in positions}
    return kept + rows, others | ratios, teachers | positions


@dataclasses.dataclass
class Sums:
    """Gradients summed over positions: of the bias [V] and, given hidden states, of the LM head's weight [V, D]."""

    bias_V: Tensor | float = 0.0
    weight_VD: Tensor | float = 0.0

    def add(self, gradient_NV: Tensor, hidden_ND: Tensor | None) -> None:
        """Add the gradients of some positions."""
        self.bias_V = self.bias_V + gradient_NV.sum(0, dtype=torch.float64)
        if hidden_ND is not None:
            self.weight_VD = self.weight_VD + (gradient_NV.T @ hidden_ND).double()

    def error(self, truth: Sums) -> tuple[float, float]:
        """Relative errors of bias and weight gradient; NaN without hidden states."""
        pairs = ((self.bias_V, truth.bias_V), (self.weight_VD, truth.weight_VD))
        return tuple(  # type: ignore[return-value]
            float((mine - its).norm() / its.norm()) if isinstance(its, Tensor) else math.nan for mine, its in pairs
        )


Found = dict[tuple[str, str, str, float], tuple[float, float, float]]
Caches = dict[tuple[str, float], TeacherCache]  # by preset and the temperature it was captured for
Sizes = dict[tuple[str, float], tuple[float, float]]


def captured_for(preset: Preset, temperature: float) -> Preset:
    """The preset as it is or, at another temperature, with records made only for students that train at it."""
    if temperature == 1.0:
        return preset
    return dataclasses.replace(preset, temperature=temperature, temperatures=())


def measure(world: World, caches: Caches, sequences: int) -> Found:
    """(target, reading, student, T) → errors of bias and weight gradient, and KL."""
    sums: dict[tuple[str, str, str, float], Sums] = {}
    kl: dict[tuple[str, str, str, float], float] = {}
    for number in range(sequences):
        for student, log_q_NV, hidden_ND, log_p_NV in _students(world, number):
            for temperature in TEMPERATURES:
                q_NV, p_NV = ((x / temperature).softmax(-1) for x in (log_q_NV, log_p_NV))
                truth = sums.setdefault(("full", "", student, temperature), Sums())
                truth.add(temperature * (q_NV - p_NV), hidden_ND)
                for target, reading, gradient_NV in _targets_gradients(
                    caches, number, log_q_NV, log_p_NV, q_NV, temperature
                ):
                    place = (target, reading, student, temperature)
                    sums.setdefault(place, Sums()).add(gradient_NV, hidden_ND)
                    if student == "mid":
                        kl[place] = kl.get(place, 0.0) + _kl(p_NV, q_NV - gradient_NV / temperature)
    positions = sum(len(world.rows(number).target_ids_N) for number in range(sequences))
    return {
        place: (*total.error(sums["full", "", *place[2:]]), kl.get(place, math.nan) / positions)
        for place, total in sums.items()
        if place[0] != "full"
    }


def _targets_gradients(
    caches: Caches,
    number: int,
    log_q_NV: Tensor,
    log_p_NV: Tensor,
    q_NV: Tensor,
    temperature: float,
) -> Iterator[tuple[str, str, Tensor]]:
    """The gradient [N, V] of one sequence by every target and reading."""
    for name in MEASURED:
        targets = _targets(caches[name, temperature], number)
        for reading in ESTIMATORS:
            yield name, reading, _gradient(log_q_NV, targets, reading, temperature)
    for name, rival in RIVALS.items():
        yield name, "", temperature * target_gradient(rival(log_p_NV, temperature), q_NV)


def _gradient(log_q_NV: Tensor, targets: SparseTargets, tail: TailEstimator, temperature: float) -> Tensor:
    """The gradient with respect to the student's logits, by the library's loss."""
    teacher = prepare_targets(targets, log_q_NV.shape[1], spec=DivergenceSpec(), tail=tail, temperature=temperature)
    gradient_NV = log_q_NV.clone()
    divergence_in_place(gradient_NV, teacher, zero_metrics(log_q_NV.device))
    return gradient_NV


def _students(world: World, number: int) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor]]:
    """Every student's log-probs and hidden states for one sequence, and the teacher's log-probs."""
    rows = world.rows(number)
    for name, share in STUDENTS.items():
        log_q_NV = share * rows.log_probs_NV + (1 - share) * world.unigram_log_probs_V
        yield name, log_q_NV.log_softmax(-1), rows.hidden_ND, rows.log_probs_NV
    if rows.student_log_probs_NV is not None:
        yield "start", rows.student_log_probs_NV, rows.student_hidden_ND, rows.log_probs_NV


def _targets(cache: TeacherCache, number: int) -> SparseTargets:
    return cache.targets([(f"run-{number:09d}", "response")])


def _kl(p_NV: Tensor, target_NV: Tensor) -> float:
    """Σ KL(p ‖ p̂) over positions; p̂ is computed as a difference, so values below rounding error count as dropped."""
    target_NV = torch.where(target_NV > 1e-12, target_NV, 0.0)
    return float(torch.where(p_NV > 1e-9, p_NV * (p_NV / target_NV).log(), 0.0).sum(dtype=torch.float64))


def table(world: World, found: Found, sizes: Sizes) -> list[Row]:
    """One row for each target, reading and temperature."""
    rows: list[Row] = []
    students = dict.fromkeys(place[2] for place in found)
    for target, reading, temperature in dict.fromkeys((place[0], place[1], place[3]) for place in found):
        place = (target, temperature)
        size, floor = sizes[place] if place in sizes else (rival_bytes(world, *place), math.nan)
        row: dict[str, str | float | int] = {"teacher": world.name, "target": target, "reading": reading}
        row |= {"T": temperature, "bytes": size, "floor": floor}
        row["kl"] = found[target, reading, "mid", temperature][2]
        for student in students:
            bias, weight, _ = found[target, reading, student, temperature]
            row[student] = bias
            if not math.isnan(weight):
                row[f"{student} weight"] = weight
        rows.append(row)
    return rows


def rival_bytes(world: World, target: str, temperature: float) -> float:
    """A rival's bytes per position, over a few sequences."""
    sample = [RIVALS[target](world.rows(number).log_probs_NV, temperature).bytes_per_position for number in range(4)]
    return float(np.mean(sample))


def ratios_of(found: Found, sizes: Sizes) -> dict[str, float]:
    """The numbers behind the project's claims."""
    ratios: dict[str, float] = {}
    for name in MEASURED:
        size, floor = sizes[name, 1.0]
        ratios |= {f"{name}_bytes": size, f"{name}_bytes_vs_entropy": size / floor}
    vocabulary_bits = 18  # DistillKit packs 18 bits per id for vocabularies of Qwen's size
    ratios["standard_bytes_vs_distillkit"] = sizes["standard", 1.0][0] / (
        (128 * vocabulary_bits + 16 * 16 + 6 * 32) / 8
    )
    pairs = (
        ("compact", "rskd", "rskd50"),
        ("standard", "distillkit", "distillkit"),
        ("standard", "bucket100", "bucket100"),
    )
    for temperature, suffix in ((1.0, ""), (2.0, "_T2")):
        for preset, label, rival in pairs:
            for student in STUDENTS:
                mine = found[preset, DEFAULT, student, temperature][0]
                its = found[rival, "", student, temperature][0]
                ratios[f"{preset}_gradient_error_vs_{label}_{student}{suffix}"] = mine / its
    return ratios


if __name__ == "__main__":
    main()
