"""The demo's commands: the whole pipeline in the toy world, exactly as typed for other data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.demo.commands import answer_command, pack_command, score_command
from llavamod_offline.demo.scheduler import Step

CHECKPOINTS = Path(__file__).parents[1] / "toyworld" / "checkpoints"
TEACHER = CHECKPOINTS / "teacher"
LANGUAGE_MODEL = CHECKPOINTS / "language_model"
SCRIPT_HEAD = "Every command of the demo. Run this script in an empty folder."
TASKS = ("gqa", "pope", "object_halbench")
WORLD = "toyworld"
SETS = ("align", "general", "multitask", "preference")


@dataclass(frozen=True)
class DemoSizes:
    """Sizes: samples of each set, images of each benchmark, steps of each stage."""

    align: int
    general: int
    multitask: int
    preference: int
    unseen: int
    benchmark_images: int
    align_steps: int
    distill_steps: int
    small_steps: int
    sparse_steps: int
    preference_steps: int


FULL = DemoSizes(
    align=1600, general=2400, multitask=1200, preference=500, unseen=200, benchmark_images=100,
    align_steps=60, distill_steps=180, small_steps=100, sparse_steps=60, preference_steps=25,
)  # fmt: skip
QUICK = DemoSizes(
    align=200, general=400, multitask=200, preference=100, unseen=40, benchmark_images=20,
    align_steps=10, distill_steps=40, small_steps=25, sparse_steps=15, preference_steps=8,
)  # fmt: skip

BATCH = ("batch.global_size=32", "batch.micro_size=32")


@dataclass(frozen=True)
class Model:
    """A row of the demo's table: its name, its checkpoint, and the training run that made it, if any."""

    name: str
    slug: str
    checkpoint: Path
    run: Path | None


def small_language_model(output: Path) -> Path:
    """The folder of the language model that the smaller student starts from."""
    return output / "small_language_model"


def models(output: Path) -> list[Model]:
    """The six models that the demo compares."""
    runs = output / "train"
    trained = (
        ("student without teacher", "sft"),
        ("distilled student", "mimic_dense"),
        ("smaller student, same cache", "smaller"),
        ("upcycled sparse student", "mimic_sparse"),
        ("after preference distillation", "preference"),
    )
    students = [Model(name, slug, runs / slug / "student", runs / slug) for name, slug in trained]
    return [Model("teacher", "teacher", TEACHER, None), *students]


def demo_steps(*, quick: bool = False, seed: int = 1) -> list[Step]:
    """Every command of the demo with the steps it needs, in a valid order, as typed in the demo's folder."""
    here, sizes = Path(), QUICK if quick else FULL
    world = ("llavamod-offline", "toyworld", "--output", ".", "--seed", str(seed), *(["--quick"] if quick else []))
    return [Step(WORLD, world), *_packing(here), *_caching(here), *_training(here, sizes), *_evaluation(here)]


def _packing(output: Path) -> Iterator[Step]:
    for name in SETS:
        yield Step(f"pack-{name}", pack_command(output / "world", name, output / "sets"), (WORLD,))


def _caching(output: Path) -> Iterator[Step]:
    for name in SETS[1:]:
        yield Step(
            f"cache-{name}",
            (
                "cache-teacher",
                "run",
                f"data={output / 'sets' / name}",
                f"teacher={TEACHER}",
                f"output={output / 'cache' / name}",
                "batch_size=32",
            ),
            (f"pack-{name}",),
        )


def _training(output: Path, sizes: DemoSizes) -> Iterator[Step]:
    def train(
        stage: str, data: str, steps: int, rate: str, needs: tuple[str, ...], *settings: str, slug: str | None = None
    ) -> Step:
        command = (
            "train-student",
            stage,
            f"data.set={output / 'sets' / data}",
            f"output={output / 'train' / (slug or stage)}",
            f"steps={steps}",
            f"optim.lr={rate}",
            *BATCH,
            *settings,
        )
        return Step(f"train-{slug or stage}", command, needs)

    def student(stage: str) -> str:
        return f"student.checkpoint={output / 'train' / stage / 'student'}"

    def cache(name: str) -> str:
        return f"cache.path={output / 'cache' / name}"

    parts = (f"student.vision_tower={TEACHER}", f"student.language_model={LANGUAGE_MODEL}")
    yield train("align", "align", sizes.align_steps, "2e-3", ("pack-align",), *parts)
    distilled = ("train-align", "cache-general")
    steps = sizes.distill_steps
    yield train("mimic_dense", "general", steps, "1e-3", distilled, student("align"), cache("general"))
    yield train("sft", "general", steps, "1e-3", ("train-align", "pack-general"), student("align"))
    # One cache, students of any size: this one differs in depth, width and LM head rows, and skips the alignment.
    small = (f"student.vision_tower={TEACHER}", f"student.language_model={small_language_model(output)}")
    steps = sizes.small_steps
    needs = ("cache-general",)
    yield train("mimic_dense", "general", steps, "2e-3", needs, *small, cache("general"), slug="smaller")
    sparse = ("train-mimic_dense", "cache-multitask")
    steps = sizes.sparse_steps
    yield train("mimic_sparse", "multitask", steps, "5e-4", sparse, student("mimic_dense"), cache("multitask"))
    preferred = ("train-mimic_sparse", "cache-preference")
    steps = sizes.preference_steps
    given = (student("mimic_sparse"), cache("preference"))
    # Without the last term, descriptions would become short: those that name absent objects are longer.
    yield train("preference", "preference", steps, "1e-4", preferred, *given, "loss.distill_weight=0.3")


def _evaluation(output: Path) -> Iterator[Step]:
    root = output / "benchmarks"
    for model in models(output):
        answers = output / "eval" / model.slug
        command = answer_command(model.checkpoint, root=root, output=answers, tasks=TASKS, batch_size=32)
        yield Step(f"answer-{model.slug}", command, (WORLD if model.run is None else f"train-{model.slug}",))
        for task in TASKS:
            score = score_command(task, root=root, answers=answers)
            yield Step(f"score-{model.slug}-{task}", score, (f"answer-{model.slug}",))
