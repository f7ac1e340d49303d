"""Which target gives the best student: held-out KL(teacher ‖ student) of fully trained students.

    python -m tests.benchmarks.readings [--quick] [--tasks NAMES] [--model FOLDER --student early-exit:N] --json FILE

Tasks are small softmax regressions (`teachers/tasks.py`): `--tasks` selects some, rows of the others in FILE stay.
Every target trains the same student from the same start on the same contexts in the same order, once per seed: on the
records of each preset, written and read back, with the default reading and with the tail as a bucket; on what rivals
keep (`teachers/rivals.py`); on sampled labels; and on the full distributions (`dense`). `excess` is held-out KL minus
that of `dense`, in nats; `error` is the standard error of these paired differences.

Regimes: `one_pass` (fresh contexts at every step), `large_batch`, `near` (from a student trained on full
distributions), `epochs` (eight batches' contexts, 25 times), `few_contexts` (those of one batch at every step).
Temperatures: 1, and 2 with records made for it (`capture.temperature`).

`--curve` measures `one_pass` at other numbers of bytes instead: records with thresholds at 1, 1/2 and 1/4 of a
sample's weight, and rivals of other sizes. `charts.readings` draws them with the presets of `one_pass`.

Ratios: `default_vs_best_PRESET_REGIME[_T2]`: the default reading's excess summed over tasks, divided by that of the
best rival with at least as many bytes in every task. `bytes` are those of `one_pass`. A row's `sigma` says how many
standard errors its excess lies above that of the best such rival in its own task.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from teacher_cache.config import PRESETS, Preset
from tests.benchmarks.form import Row, finish, parse_arguments, write
from tests.benchmarks.teachers import rivals
from tests.benchmarks.teachers.tasks import Task, low_rank_task, model_task, ngram_task, toy_task
from tests.benchmarks.teachers.training import Regime, Trained, train_all

NAME = "readings"
SEEDS = 5
MEASURED = ("small", "compact", "standard")
MEASURED_RIVALS = ("bucket100", "rskd50", "distillkit")
REGIMES = {
    "one_pass": Regime(300),
    "large_batch": Regime(40, scale=8),
    "near": Regime(120, near=True),
    "epochs": Regime(200, pool=8),
    "few_contexts": Regime(200, pool=1),
}
_ALL = tuple(REGIMES)
TASKS: dict[str, tuple[Callable[[bool], Task], tuple[str, ...]]] = {
    "ngram": (lambda quick: ngram_task(*((800, 60) if quick else ())), ("one_pass", "epochs", "few_contexts")),
    "low_rank_10": (lambda quick: low_rank_task(10, *((300,) if quick else ())), ("one_pass",)),
    "low_rank_24": (lambda quick: low_rank_task(24, *((300,) if quick else ())), _ALL),
    "toy": (lambda quick: toy_task(8 if quick else 60), ("one_pass", "few_contexts")),
}
_CURVE = {"ngram": "one_pass", "low_rank_24": "one_pass"}
_WEIGHTS = (8, 16, 32, 64, 128, 256)
_SPLITS = (1, 2, 4)

Runs = dict[str, list[Trained]]  # for each target, one per seed


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(
        NAME, __doc__ or "", {"tasks": "", "model": "", "student": "", "seeds": SEEDS, "curve": False}
    )
    options, quick = arguments.options, arguments.quick
    torch.set_num_threads(1)  # the steps are small
    tasks = dict(TASKS)
    if options["model"]:
        tasks["model"] = (
            lambda quick: model_task(options["model"], options["student"], 2 if quick else 60),
            ("one_pass",),
        )
    chosen = options["tasks"].split(",") if options["tasks"] else [*(_CURVE if options["curve"] else tasks)]
    if unknown := [name for name in chosen if name not in tasks]:
        raise SystemExit(f"--tasks: '{unknown[0]}' is not among {', '.join(tasks)}; 'model' needs --model FOLDER")
    file = arguments.json_file
    before = json.loads(file.read_text()) if file and file.exists() else None
    rows: list[Row] = before["rows"] if before and before["settings"]["quick"] == quick else []
    settings: dict[str, Any] = {name: dataclasses.asdict(PRESETS[name]) for name in MEASURED}
    settings["regimes"] = {name: dataclasses.asdict(regime) for name, regime in REGIMES.items()}
    settings["seeds"] = options["seeds"]
    for name in chosen:
        maker, regimes = tasks[name]
        task, sizes = maker(quick), dict[tuple[str, float], float]()
        for regime_name in (_CURVE[name],) if options["curve"] else regimes:
            regime = REGIMES[regime_name]
            if quick:
                regime = dataclasses.replace(regime, steps=regime.steps // 30, scale=min(regime.scale, 2))
            part = "curve" if options["curve"] else regime_name
            one = options["curve"] or (quick and regime_name != regimes[0])
            for temperature in (1.0,) if one else (1.0, 2.0):
                runs = train_seeds(task, regime, temperature, range(2 if quick else options["seeds"]), options["curve"])
                for target, trained in runs.items():  # of so few records, the size would be mostly file overhead
                    size = float(np.mean([each.bytes_per_position for each in trained]))
                    sizes.setdefault((target, temperature), size)
                found = table(task.name, part, temperature, runs, {name: sizes[name, temperature] for name in runs})
                here = (task.name, part, temperature)
                rows = [row for row in rows if (row["task"], row["regime"], row["T"]) != here] + found
                write(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))  # a kill loses one part
                print(f"{task.name} {part} T = {temperature:g}: done", flush=True)
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))


def train_seeds(task: Task, regime: Regime, temperature: float, seeds: range, curve: bool) -> Runs:
    """Train the students of all targets, once per seed."""
    presets = {name: dataclasses.replace(PRESETS[name], temperatures=()) for name in MEASURED}
    others = {"labels": rivals.labels, **{name: rivals.RIVALS[name] for name in MEASURED_RIVALS}}
    if curve:
        presets = {f"n{n} p≥1/{n * split}": _split(n, split) for n in _WEIGHTS for split in _SPLITS}
        others |= {**rivals.RIVALS, **rivals.OTHER_SIZES}
    runs: Runs = {}
    for seed in seeds:
        found = train_all(
            task,
            regime,
            temperature=temperature,
            seed=seed,
            presets=presets,
            rivals=others,
            estimators=() if curve else ("bucket",),
        )
        for name, trained in found.items():
            runs.setdefault(name, []).append(trained)
    return runs


def _split(n: int, split: int) -> Preset:
    """Tail samples of weight 1/n, and in the top-k all ids above 1/split of that."""
    return Preset(1.0, 1 / (n * split), n * split, n, float(n), "fine" if n > 100 else "coarse")


def table(task: str, regime: str, temperature: float, runs: Runs, sizes: dict[str, float]) -> list[Row]:
    """One row for each target."""
    excess = {
        name: [mine.kl - dense.kl for mine, dense in zip(each, runs["dense"], strict=True)]
        for name, each in runs.items()
    }
    presets = [name for name in runs if name.split()[0] in MEASURED]
    rows: list[Row] = []
    for name, values in excess.items():
        row: dict[str, str | float | int] = {"task": task, "regime": regime, "T": temperature, "target": name}
        row |= {"bytes": sizes[name], "excess": float(np.mean(values)), "error": _error(values)}
        row["kl"] = float(np.mean([trained.kl for trained in runs[name]]))
        larger = [other for other in runs if other not in (*presets, "dense", "labels") and sizes[other] >= sizes[name]]
        if name in presets and larger:
            best = min(larger, key=lambda other: float(np.mean(excess[other])))
            gaps = [mine - its for mine, its in zip(values, excess[best], strict=True)]
            row |= {"best": best, "sigma": float(np.mean(gaps)) / max(_error(gaps), 1e-12)}
        rows.append(row)
    return rows


def _error(values: list[float]) -> float:
    """The standard error of a mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """The numbers behind the project's claims; see this module's docstring."""
    ratios: dict[str, float] = {}
    for regime in REGIMES:
        for temperature, suffix in ((1.0, ""), (2.0, "_T2")):
            here = [row for row in rows if row["regime"] == regime and row["T"] == temperature]
            tasks = dict.fromkeys(row["task"] for row in here)
            by_task = {task: {row["target"]: row for row in here if row["task"] == task} for task in tasks}
            for preset in MEASURED:
                mine = [by_task[task][preset] for task in tasks]
                sums = [
                    sum(float(by_task[task][rival]["excess"]) for task in tasks)
                    for rival in MEASURED_RIVALS
                    if mine and all(float(by_task[row["task"]][rival]["bytes"]) >= float(row["bytes"]) for row in mine)
                ]
                if sums and min(sums) > 0:  # in a quick run the noise may exceed the excess
                    ratio = sum(float(row["excess"]) for row in mine) / min(sums)
                    ratios[f"default_vs_best_{preset}_{regime}{suffix}"] = ratio
    return ratios


if __name__ == "__main__":
    main()
