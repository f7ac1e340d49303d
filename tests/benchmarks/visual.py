"""What weighting tokens by their visual advantage gives, on the toy world.

    python -m tests.benchmarks.visual [--quick] [--folder DIR] --json FILE

Students of the demo's shape learn by mimic distillation from one cache (capture.without_image=blank), by the same
batches a seed; the arms differ in loss.visual_weight alone: 0, 1 and 4. `accuracy`: on questions in GQA's form;
`hallucination`: Object HalBench's share of descriptions that name something absent. Ratios: `ARM_vs_0` of both, of the
means over seeds. The commands run in this process, as typed otherwise; with `--folder` they resume what an earlier call
has left there.
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

import eval.cli
from llavamod_offline.demo.commands import answer_command, pack_command, score_command
from llavamod_offline.demo.plan import LANGUAGE_MODEL, TEACHER
from llavamod_offline.demo.results import read_result
from tests.benchmarks.form import Row, finish, parse_arguments, write
from tests.benchmarks.rounds import APPS, run

NAME = "visual"
WEIGHTS = ("0", "1", "4")
SCORES = {"accuracy": ("gqa", "accuracy"), "hallucination": ("object_halbench", "response_hall")}


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "", {"seeds": 3, "steps": 180, "rate": 1e-3, "folder": ""})
    given = dict(arguments.options) | ({"seeds": 1, "steps": 3} if arguments.quick else {})
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    APPS.setdefault("eval-student", eval.cli.app)
    rows: list[Row] = []
    settings: dict[str, Any] = {name: value for name, value in given.items() if name != "folder"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given["folder"] or temporary)
        write_start(folder, quick=arguments.quick)
        for seed, weight in itertools.product(range(given["seeds"]), WEIGHTS):
            rows.append(run_arm(folder, weight, seed=seed, steps=given["steps"], rate=given["rate"]))
            print(rows[-1], flush=True)
            write(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Each arm's scores over those without weights."""
    found = {}
    for score, weight in itertools.product(SCORES, WEIGHTS[1:]):
        own, plain = ([float(row[score]) for row in rows if row["visual_weight"] == arm] for arm in (weight, "0"))
        if own and statistics.mean(plain):
            found[f"{score}_{weight}_vs_0"] = statistics.mean(own) / statistics.mean(plain)
    return found


def write_start(folder: Path, *, quick: bool) -> None:
    """The toy world, its general set, and the teacher's cache of it."""
    if not (folder / "world").exists():
        run("llavamod-offline", "toyworld", "--output", f"{folder}", "--seed", "1", *(["--quick"] if quick else []))
    if not (folder / "sets" / "general").exists():
        run(*pack_command(folder / "world", "general", folder / "sets"), "--workers", "1")
    places = (f"data={folder}/sets/general", f"teacher={TEACHER}", f"output={folder}/cache")
    run("cache-teacher", "run", *places, "batch_size=32", "capture.without_image=blank")


def run_arm(folder: Path, weight: str, *, seed: int, steps: int, rate: float) -> Row:
    """Train one student with one seed, and score it."""
    output = folder / f"weight-{weight}-{seed}"
    run(
        *("train-student", "mimic_dense", f"data.set={folder}/sets/general", f"cache.path={folder}/cache"),
        *(f"student.vision_tower={TEACHER}", f"student.language_model={LANGUAGE_MODEL}", f"output={output}"),
        *("batch.global_size=32", "batch.micro_size=32", "workers=0", "save_steps=0", "log_steps=10"),
        *(f"steps={steps}", f"optim.lr={rate}", f"seed={seed}", f"loss.visual_weight={weight}"),
    )
    tasks = [task for task, _ in SCORES.values()]
    answers, root = output / "answers", folder / "benchmarks"
    run(*answer_command(output / "student", root=root, output=answers, tasks=tasks, batch_size=32))
    row: dict[str, str | float | int] = {"visual_weight": weight, "seed": seed}
    for score, (task, field) in SCORES.items():
        run(*score_command(task, root=root, answers=answers))
        row[score] = float(read_result(answers / task / "score.json")["metrics"][field])
    return row


if __name__ == "__main__":
    main()
