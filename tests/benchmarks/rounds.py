"""Rounds on a student's own answers against the same steps on the set's answers, in the toy world.

    python -m tests.benchmarks.rounds [--quick] [--folder DIR] --json FILE

A student learns from the toy teacher by mimic distillation (forward KL on a set's answers); starting from it, each arm
takes the same number of further steps on the same new prompts, once per seed, at the same learning rate:

- `own_reverse`, `own_forward`, `own_policy`: two rounds of `llavamod-offline rounds` with the loss named;
- `set_forward`, `set_reverse`: as many steps on the set's answers, in two runs; nothing is generated.

`reverse_kl`: KL(student ‖ teacher) in nats per token, on answers that the arm's own student samples to held-out
prompts; `error`: its standard error over answers; `start`: the same KL for the student before. `gain`: start minus
reverse_kl. Ratios: `ARM_vs_set_forward`: the mean gain divided by that of the same steps of off-policy distillation.
The commands run in this process, otherwise as a user types them; with `--folder` they resume what an earlier call left
there.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from typer.main import get_command

import llavamod_offline.cli
import teacher_cache.cli.main
import train.cli
from llavamod_offline.config import load_config
from llavamod_offline.demo.plan import LANGUAGE_MODEL, TEACHER
from llavamod_offline.toyworld.datasets import write_datasets
from tests.benchmarks.form import Row, finish, parse_arguments, write
from train.rounds.config import RoundsConfig
from train.rounds.measure import OwnAnswers, measure_own_answers
from train.rounds.plan import round_folder, round_steps, student_of

NAME = "rounds"
APPS = {
    "llavamod-offline": llavamod_offline.cli.app,
    "cache-teacher": teacher_cache.cli.main.app,
    "train-student": train.cli.app,
}
OWN = {"own_reverse": "reverse_kl", "own_forward": "forward_kl", "own_policy": "policy_gradient"}
SET = {"set_forward": "forward_kl", "set_reverse": "reverse_kl"}
COMPARED = ["own_reverse", "set_forward"]  # first, as they answer the question
ROUNDS, QUICK_ROUNDS = 2, 1


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "", {"seeds": 3, "steps": 40, "rate": 3e-4, "folder": ""})
    options, quick = arguments.options, arguments.quick
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sizes = {"samples": 400, "prompts": 320, "holdout": 400, "start": 150}
    if quick:
        sizes = {"samples": 40, "prompts": 40, "holdout": 20, "start": 4}
    seeds, steps = (1, 2) if quick else (options["seeds"], options["steps"])
    rounds = QUICK_ROUNDS if quick else ROUNDS
    settings: dict[str, Any] = {**sizes, "seeds": seeds, "steps": steps, "rounds": rounds, "rate": options["rate"]}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options["folder"] or temporary)
        start = write_start(folder, **sizes)
        before = _measured(folder, "start", start, 0)
        for arms in (COMPARED, [arm for arm in (*OWN, *SET) if arm not in COMPARED]):
            for seed, arm in itertools.product(range(seeds), arms):
                found = run_arm(folder, arm, start, seed=seed, rounds=rounds, steps=steps, rate=options["rate"])
                row: dict[str, str | float | int] = {"arm": arm, "seed": seed, "start": before.reverse_kl}
                row |= {"reverse_kl": found.reverse_kl, "error": found.standard_error}
                row |= {"gain": before.reverse_kl - found.reverse_kl, "length": found.length}
                rows.append(row | {"answers": found.answers, "rejected": found.rejected})
                print(rows[-1], flush=True)
                write(NAME, arguments, settings=settings, rows=rows, ratios={})
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Each arm's gain divided by that of off-policy distillation, from the means over seeds."""
    gains = {arm: [float(row["gain"]) for row in rows if row["arm"] == arm] for arm in (*OWN, *SET)}
    found = {arm: statistics.mean(own) for arm, own in gains.items() if own}
    return {f"{arm}_vs_set_forward": gain / found["set_forward"] for arm, gain in found.items() if arm != "set_forward"}


def write_start(folder: Path, *, samples: int, prompts: int, holdout: int, start: int) -> Path:
    """Write three sets, the teacher's caches of two, and a student trained on the first; return the student."""
    for name, size, seed in (("set", samples, 1), ("unseen", holdout, 2), ("prompts", prompts, 3)):
        world = folder / f"{name}-world"
        if (folder / name).exists():
            continue
        write_datasets(world, align=0, general=size, multitask=0, preference=0, error_share=0.0, seed=seed)
        run(
            *("llavamod-offline", "pack", f"{world}/general.json", "--images", f"{world}/images"),
            *("--output", f"{folder}/{name}", "--workers", "1"),
        )
    for name, cache in (("set", "cache"), ("prompts", "prompts-cache")):
        places = (f"data={folder}/{name}", f"teacher={TEACHER}", f"output={folder}/{cache}")
        run("cache-teacher", "run", *places, "batch_size=32")
    parts = (f"student.vision_tower={TEACHER}", f"student.language_model={LANGUAGE_MODEL}")
    learn(folder, "mimic", "set", "cache", *parts, f"steps={start}", "optim.lr=1e-3")
    return folder / "mimic" / "student"


def run_arm(folder: Path, arm: str, start: Path, *, seed: int, rounds: int, steps: int, rate: float) -> OwnAnswers:
    """Train one arm with one seed and measure its student."""
    where = f"{arm}-{seed}"
    if arm in SET:
        student = start
        for number in range(1, rounds + 1):
            given = (f"student.checkpoint={student}", f"steps={steps}", f"optim.lr={rate}", f"seed={seed + number}")
            learn(folder, f"{where}-{number}", "prompts", "prompts-cache", *given, f"loss.divergence={SET[arm]}")
            student = folder / f"{where}-{number}" / "student"
        return _measured(folder, where, student, seed)
    config = load_config(RoundsConfig, (), _rounds(folder, where, start, seed, OWN[arm], steps, rate, rounds=rounds))
    done = [step for step in round_steps(config) if "holdout" not in step.name]
    for step in done:
        run(*step.command)
    return _measured(folder, where, Path(student_of(config, rounds)), seed)


def _measured(folder: Path, name: str, student: Path, seed: int) -> OwnAnswers:
    """Measure a student on the held-out prompts, with the commands that measure a round."""
    config = load_config(
        RoundsConfig, (), _rounds(folder, f"{name}-holdout", student, seed, "reverse_kl", 1, 1.0, rounds=1)
    )
    for step in round_steps(config)[:2]:
        run(*step.command)
    where = round_folder(config.output, 0) / "holdout"
    return measure_own_answers(where / "set", where / "cache")


def _rounds(
    folder: Path, name: str, student: Path, seed: int, loss: str, steps: int, rate: float, *, rounds: int
) -> list[str]:
    return [
        f"prompts={folder}/prompts",
        f"holdout={folder}/unseen",
        f"teacher={TEACHER}",
        f"student={student}",
        f"output={folder}/{name}",
        f"rounds={rounds}",
        f"steps={steps}",
        f"loss={loss}",
        f"seed={seed}",
        "max_new_tokens=96",
        "batch_size=64",
        f"train=[batch.global_size=32,batch.micro_size=32,workers=0,save_steps=0,optim.lr={rate}]",
    ]


def learn(folder: Path, name: str, data: str, cache: str, *settings: str) -> None:
    """Train by mimic distillation on a set's answers."""
    places = (f"data.set={folder}/{data}", f"cache.path={folder}/{cache}", f"output={folder}/{name}")
    sizes = ("batch.global_size=32", "batch.micro_size=32", "workers=0", "save_steps=0")
    run("train-student", "mimic_dense", *places, *sizes, *settings)


def run(script: str, *arguments: str) -> None:
    """Run a command in this process; rejected answers do not count as failure."""
    try:
        get_command(APPS[script]).main(list(arguments), prog_name=script, standalone_mode=False)
    except typer.Exit as ended:
        if ended.exit_code != 3:
            raise


if __name__ == "__main__":
    main()
