"""The ladder's commands: every run of the table for every seed, each with a toy world of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llavamod_offline.demo.commands import answer_command, pack_command, score_command
from llavamod_offline.demo.plan import BATCH, CHECKPOINTS, FULL, LANGUAGE_MODEL, QUICK, TASKS, TEACHER, DemoSizes
from llavamod_offline.demo.scheduler import Step
from llavamod_offline.ladder.table import CACHES, RUNS, Run

# Learning rates of the demo; those of the recipes are for models a thousand times as large.
_RATES = {
    "align": "2e-3",
    "sft": "1e-3",
    "mimic_dense": "1e-3",
    "mimic_dense_aligned": "1e-3",
    "mimic_sparse": "5e-4",
    "preference": "1e-4",
}
_SECOND_RATE = "5e-4"  # on the second set, for all stages
# Fewer steps: there are about thirty students per seed; more questions: 500 cannot show a difference of .03.
_FULL = replace(FULL, distill_steps=120, sparse_steps=40, preference_steps=40, benchmark_images=300)
UNSEEN = "unseen"


def folder_of(seed: int) -> Path:
    """The folder of a seed, below that of the ladder."""
    return Path(f"seed-{seed}")


def ladder_steps(seed: int, *, quick: bool) -> list[Step]:
    """Every command of a seed with the steps it needs, as typed in the ladder's folder; seeds count from 1."""
    return list(_steps(seed, QUICK if quick else _FULL, quick=quick))


def plan_digest(steps: Sequence[Step]) -> str:
    """SHA-256 (hex) of the commands, independent of where the toy world's checkpoints are installed."""
    words = "\n".join(" ".join(step.command) for step in steps)
    return hashlib.sha256(words.replace(str(CHECKPOINTS), "").encode()).hexdigest()


def step_name(seed: int, what: str) -> str:
    """The name of a step, such as `2-train-dense`."""
    return f"{seed}-{what}"


def seed_of(name: str) -> int:
    """The seed in a step's name."""
    return int(name.partition("-")[0])


def _steps(seed: int, sizes: DemoSizes, *, quick: bool) -> Iterator[Step]:
    here = folder_of(seed)

    def step(what: str, command: tuple[str, ...], *needs: str) -> Step:
        return Step(step_name(seed, what), command, tuple(step_name(seed, need) for need in needs), group=seed)

    drawn = ["llavamod-offline", "toyworld", "--output", str(here), "--seed", str(seed)]
    drawn += ["--quick"] if quick else ["--benchmark-images", str(sizes.benchmark_images)]
    yield step("toyworld", tuple(drawn))
    for name in dict.fromkeys([*(run.data for run in RUNS), *(cache.data for cache in CACHES)]):
        yield step(f"pack-{name}", pack_command(here / "world", name, here / "sets"), "toyworld")
    for cache in CACHES:
        run = ("cache-teacher", "run", f"data={here / 'sets' / cache.data}", f"teacher={TEACHER}", "batch_size=32")
        output = f"output={here / 'caches' / cache.name}"
        yield step(f"cache-{cache.name}", (*run, output, *cache.settings), f"pack-{cache.data}")
    for one in RUNS:
        caches = [] if one.cache is None else [f"cache-{one.cache}"]
        parents = [] if one.parent is None else [f"train-{one.parent}"]
        yield step(f"train-{one.name}", _training(one, here, seed, sizes), f"pack-{one.data}", *caches, *parents)
    students = {one.name: here / "train" / one.name / "student" for one in RUNS if one.stage != "align"}
    for name, model in {"teacher": TEACHER, **students}.items():
        made = [] if model == TEACHER else [f"train-{name}"]
        answers = here / "answers" / name
        root = here / "benchmarks"
        answer = answer_command(model, root=root, output=answers, tasks=TASKS, batch_size=32)
        yield step(f"answer-{name}", answer, "toyworld", *made)
        for task in TASKS:
            yield step(f"score-{name}-{task}", score_command(task, root=root, answers=answers), f"answer-{name}")
        yield step(
            f"measure-{name}",
            (
                "train-student", "measure", f"student.checkpoint={model}", f"data.set={here / 'sets' / UNSEEN}",
                f"cache.path={here / 'caches' / UNSEEN}", "batch_size=32", "workers=0",
                "-o", str(answers / "unseen.json"),
            ),
            f"cache-{UNSEEN}",
            f"answer-{name}",
        )  # fmt: skip


def _training(run: Run, here: Path, seed: int, sizes: DemoSizes) -> tuple[str, ...]:
    steps = {
        "align": sizes.align_steps,
        "general": sizes.distill_steps,
        "multitask": sizes.sparse_steps,
        "preference": sizes.preference_steps,
    }
    if run.parent is None:
        start = [f"student.vision_tower={TEACHER}", f"student.language_model={LANGUAGE_MODEL}"]
    else:
        start = [f"student.checkpoint={here / 'train' / run.parent / 'student'}"]
    second = run.data == "multitask"
    return (
        "train-student",
        run.stage,
        f"data.set={here / 'sets' / run.data}",
        *(() if run.cache is None else (f"cache.path={here / 'caches' / run.cache}",)),
        *start,
        f"output={here / 'train' / run.name}",
        f"steps={steps[run.data]}",
        f"optim.lr={_SECOND_RATE if second else _RATES[run.stage]}",
        *BATCH,
        f"seed={seed}",
        "workers=0",
        "save_steps=0",
        *run.settings,
    )
