"""Distillation against training without a teacher, on a public data set that this project did not make: easy-VQA.

    python -m tests.benchmarks.easy_vqa --json FILE [--seeds 5] [--output FOLDER]

Using the ordinary commands: the toy world's teacher is trained on all training images, and captured once per seed;
students with half its layers and a new projector learn from a few of these images, with and without the teacher, for
equally many steps: from easy-VQA's answers and (`_noisy`) from the same answers with a fifth of them replaced by wrong
ones, since real data has errors. Accuracy is measured on easy-VQA's own test split. `--output` keeps the files;
rerunning the same command resumes.

`accuracy_teacher`, `accuracy_alone`, `accuracy_distilled`: means over seeds. `p_distilled_over_alone`: p-value of the
exact paired test of signs and sizes. `distilled_over_alone`: the ratio of the mean accuracies.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from llavamod_offline.demo.commands import answer_command, score_command
from llavamod_offline.demo.plan import LANGUAGE_MODEL, TEACHER
from llavamod_offline.demo.scheduler import Step, run_steps
from llavamod_offline.ladder.claims import compare
from tests.benchmarks.form import Row, finish, parse_arguments
from tests.benchmarks.worlds.easy_vqa import TRAINING_IMAGES, write_test_split, write_training_set

NAME = "easy_vqa"
FULL = {"teacher_images": 4000, "student_images": 400, "questions": 2000, "teacher_steps": 1200, "student_steps": 150}
QUICK = {"teacher_images": 64, "student_images": 32, "questions": 20, "teacher_steps": 3, "student_steps": 3}
STUDENTS = {"alone": "sft", "distilled": "mimic_dense"}
WRONG = {"": 0.0, "_noisy": 0.2}
QUICK_WRONG = {"_noisy": 0.2}
BATCH = ("batch.global_size=32", "batch.micro_size=32", "workers=0", "save_steps=0")


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "", {"seeds": 5, "output": ""})
    sizes, wrong = (QUICK, QUICK_WRONG) if arguments.quick else (FULL, WRONG)
    seeds = range(1, (1 if arguments.quick else arguments.options["seeds"]) + 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.options["output"] or temporary).resolve()
        found = measure(folder, sizes, seeds, wrong)
    rows: list[Row] = [
        {"student": name, "seed": seed, "accuracy": value}
        for name, values in found.items()
        for seed, value in zip(seeds, values, strict=False)
    ]
    ratios = {f"accuracy_{name}": mean(values) for name, values in found.items()}
    for kind in wrong:
        distilled, alone = found[f"distilled{kind}"], found[f"alone{kind}"]
        if mean(alone) > 0:
            ratios[f"distilled_over_alone{kind}"] = mean(distilled) / mean(alone)
        ratios[f"p_distilled_over_alone{kind}"] = compare(distilled, alone, "higher").p
    ratios |= {f"spread_{name}": stdev(values) for name, values in found.items() if len(values) > 1}
    settings: dict[str, Any] = {**sizes, "seeds": len(seeds), "batch": 32, "wrong": WRONG["_noisy"]}
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios)


def measure(folder: Path, sizes: dict[str, int], seeds: range, wrong: dict[str, float]) -> dict[str, list[float]]:
    """Train and score everything in `folder`; return the teacher's accuracies and each student's, one per seed.

    `wrong`: the share of wrong answers in the students' sets, by what their names end in.
    """
    write_training_set(folder / "teacher.json", images=sizes["teacher_images"], seed=0)
    for seed in seeds:
        for kind, share in wrong.items():
            file = folder / f"student{kind}-{seed}.json"
            write_training_set(file, images=sizes["student_images"], seed=seed, wrong=share)
    write_test_split(folder / "benchmarks", questions=sizes["questions"])
    run_steps(
        list(_steps(sizes, seeds, list(wrong))),
        folder,
        at_once=2,
        on_end=lambda step, seconds: print(step.name, flush=True),
    )
    students = {
        name: [_accuracy(folder / "answers" / f"{name}-{seed}") for seed in seeds]
        for name in (f"{student}{kind}" for kind in wrong for student in STUDENTS)
    }
    return {"teacher": [_accuracy(folder / "answers" / "teacher")], **students}


def _steps(sizes: dict[str, int], seeds: range, kinds: list[str]) -> Iterator[Step]:
    """The commands as a user would type them in the folder."""

    def pack(name: str) -> Step:
        command = (
            "llavamod-offline",
            "pack",
            f"{name}.json",
            "--images",
            str(TRAINING_IMAGES),
            "--output",
            f"sets/{name}",
        )
        return Step(f"pack-{name}", (*command, "--overwrite"))

    yield pack("teacher")
    start = ("data.set=sets/teacher", f"student.checkpoint={TEACHER}", "output=train/teacher")
    steps = (f"steps={sizes['teacher_steps']}", "optim.lr=1e-3", "trainable=[vision,projector,text]", *BATCH)
    yield Step("train-teacher", ("train-student", "sft", *start, *steps), ("pack-teacher",))
    yield from _scored("teacher")
    for kind, seed in itertools.product(kinds, seeds):
        data = f"student{kind}-{seed}"
        yield pack(data)
        capture = (f"data=sets/{data}", "teacher=train/teacher/student", f"output=caches/{data}", "batch_size=32")
        yield Step(f"cache-{data}", ("cache-teacher", "run", *capture), (f"pack-{data}", "train-teacher"))
        for student, stage in STUDENTS.items():
            name = f"{student}{kind}-{seed}"
            cache = (f"cache.path=caches/{data}",) if stage == "mimic_dense" else ()
            parts = (f"student.vision_tower={TEACHER}", f"student.language_model={LANGUAGE_MODEL}")
            given = (f"data.set=sets/{data}", *cache, *parts, f"output=train/{name}", f"seed={seed}", *BATCH)
            rates = (f"steps={sizes['student_steps']}", "optim.lr=2e-3")
            yield Step(f"train-{name}", ("train-student", stage, *given, *rates), (f"cache-{data}",))
            yield from _scored(name)


def _scored(name: str) -> Iterator[Step]:
    root, answers = Path("benchmarks"), Path("answers") / name
    answer = answer_command(f"train/{name}/student", root=root, output=answers, tasks=("gqa",), batch_size=64)
    yield Step(f"answer-{name}", answer, (f"train-{name}",))
    yield Step(f"score-{name}", score_command("gqa", root=root, answers=answers), (f"answer-{name}",))


def _accuracy(folder: Path) -> float:
    return float(json.loads((folder / "gqa" / "score.json").read_text())["metrics"]["accuracy"])


if __name__ == "__main__":
    main()
