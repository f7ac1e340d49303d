"""The commands of the rounds, in order, as typed in a shell; each can be run anywhere that sees the same files.

OUTPUT/round-0/holdout/         the initial student: its answers to held-out prompts, and the teacher's scores of them
OUTPUT/round-1/set, cache, run  what the student wrote, the teacher's records of it, the training on them
OUTPUT/round-1/holdout/         the student of round 1, measured in the same way
OUTPUT/round-1/eval/            its answers to benchmarks, if there are any
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from llavamod_offline.config import load_config
from llavamod_offline.demo.commands import answer_command, score_command
from llavamod_offline.demo.scheduler import Step
from llavamod_offline.errors import ConfigError
from teacher_cache.config import CacheTeacherConfig
from train.config.recipes import resolve_config
from train.rounds.config import RoundsConfig

SCRIPT_HEAD = "The commands of the rounds, in order. Rerun any of them to resume it."


def round_folder(output: str | Path, number: int) -> Path:
    """The folder of a round; round 0 is the initial student."""
    return Path(output) / f"round-{number}"


def student_of(config: RoundsConfig, number: int) -> str:
    """The student after a round."""
    return str(round_folder(config.output, number) / "run" / "student") if number else config.student


def round_steps(config: RoundsConfig) -> list[Step]:
    """Every command, in order."""
    steps = list(_measuring(config, 0))
    for number in range(1, config.rounds + 1):
        steps += [_writing(config, number), _scoring(config, number), _training(config, number)]
        steps += _measuring(config, number)
    return steps


def check_settings(config: RoundsConfig) -> None:
    """Read the settings of `write`, `score` and `train` as their commands will.

    Errors: `ConfigError` naming which of the three its command does not accept.
    """
    written, scored, trained = (make(config, 1).command for make in (_writing, _scoring, _training))
    arguments = {"write": written[2:], "score": scored[2:], "train": trained[len(shlex.split(config.trainer)) :]}
    for name, given in arguments.items():
        try:
            if name == "train":
                resolve_config(given)
            else:
                load_config(CacheTeacherConfig, (), given)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _writing(config: RoundsConfig, number: int) -> Step:
    own = (
        f"generate.temperature={config.temperature:g}",
        f"generate.round={number}",
        f"generate.key_suffix=-r{number}",
    )
    places = (config.prompts, student_of(config, number - 1), round_folder(config.output, number))
    return _write(config, f"write-{number}", *places, number, (*own, *config.write))


def _scoring(config: RoundsConfig, number: int) -> Step:
    preset = ("capture.preset=reference",) if config.loss == "policy_gradient" else ()
    return _score(config, f"score-{number}", round_folder(config.output, number), (*preset, *config.score))


def _training(config: RoundsConfig, number: int) -> Step:
    folder = round_folder(config.output, number)
    if config.loss == "policy_gradient":
        loss: tuple[str, ...] = ("loss.kind=policy_gradient",)
    else:
        loss = ("loss.kind=only_kd", f"loss.divergence={config.loss}", "loss.positions=written")
    command = (
        *shlex.split(config.trainer),
        config.stage,
        f"data.set={folder / 'set'}",
        f"cache.path={folder / 'cache'}",
        f"student.checkpoint={student_of(config, number - 1)}",
        *(("student.upcycle=null",) if config.stage == "mimic_sparse" else ()),
        f"output={folder / 'run'}",
        f"steps={config.steps}",
        f"seed={config.seed + number}",
        *loss,
        *config.train,
    )
    return Step(f"train-{number}", command)


def _measuring(config: RoundsConfig, number: int) -> Iterator[Step]:
    folder, student = round_folder(config.output, number) / "holdout", student_of(config, number)
    unchanged = (setting for setting in config.write if not setting.startswith("generate."))  # such as the device
    own = ("generate.temperature=1", f"generate.key_suffix=-h{number}", *unchanged)
    yield from _benchmarks(config, number)  # first: what is wrong with them shows before the teacher runs
    yield _write(config, f"write-holdout-{number}", config.holdout, student, folder, 0, own)
    engine = (setting for setting in config.score if not setting.startswith("capture."))
    yield _score(config, f"score-holdout-{number}", folder, ("capture.preset=reference", *engine))


def _benchmarks(config: RoundsConfig, number: int) -> Iterator[Step]:
    if config.benchmarks is None:
        return
    student = student_of(config, number)
    answers = round_folder(config.output, number) / "eval"
    command = answer_command(
        student, root=config.benchmarks, output=answers, tasks=config.tasks, batch_size=config.batch_size
    )
    yield Step(f"answer-{number}", command)
    for task in config.tasks:
        yield Step(f"score-{task}-{number}", score_command(task, root=config.benchmarks, answers=answers))


def _write(
    config: RoundsConfig, name: str, prompts: str, student: str, folder: Path, number: int, own: tuple[str, ...]
) -> Step:
    command = (
        "cache-teacher",
        "generate",
        f"data={prompts}",
        f"teacher={student}",
        f"output_set={folder / 'set'}",
        f"output={folder / 'cache'}",
        "generate.capture=false",
        f"generate.max_new_tokens={config.max_new_tokens}",
        f"generate.seed={config.seed + number}",
        f"batch_size={config.batch_size}",
        *own,
    )
    return Step(name, command, may_reject=True)


def _score(config: RoundsConfig, name: str, folder: Path, settings: tuple[str, ...]) -> Step:
    places = (f"data={folder / 'set'}", f"teacher={config.teacher}", f"output={folder / 'cache'}")
    command = ("cache-teacher", "run", *places, f"batch_size={config.batch_size}", *settings)
    return Step(name, command, may_reject=True)
