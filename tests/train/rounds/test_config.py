"""The rounds' settings, and the commands that they turn into."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.demo.commands import as_script
from llavamod_offline.errors import ConfigError
from teacher_cache.config import CacheTeacherConfig
from train.config.recipes import resolve_config
from train.rounds.config import RoundsConfig
from train.rounds.plan import SCRIPT_HEAD, check_settings, round_steps

PLACES = ("prompts=a", "holdout=b", "teacher=t", "student=s", "output=out")


def rounds_of(*settings: str) -> RoundsConfig:
    return load_config(RoundsConfig, (), [*PLACES, *settings])


@pytest.mark.parametrize("stage", ["mimic_dense", "mimic_sparse"])
@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "policy_gradient"])
def test_every_command_is_one_that_its_program_takes(loss: str, stage: str) -> None:
    """Also, each round starts from the previous round's student."""
    given = (f"loss={loss}", f"stage={stage}", "rounds=3", "write=[generate.top_p=0.9,dtype=float32]")
    steps = round_steps(rounds_of(*given, "score=[capture.seed=3]", "train=[optim.lr=1e-5]"))
    names = [step.name for step in steps]
    assert names == [
        *("write-holdout-0", "score-holdout-0"),
        *(f"{what}-{n}" for n in (1, 2, 3) for what in ("write", "score", "train", "write-holdout", "score-holdout")),
    ]
    student = "s"
    for step in steps:
        program, *arguments = step.command
        if program == "train-student":
            config = resolve_config(arguments)
            assert (config.student.checkpoint, config.optim.lr, config.loss.on_own_answers) == (student, 1e-5, True)
            assert config.data.set.startswith(config.output.removesuffix("run"))
            student = f"{config.output}/student"
            continue
        capture = load_config(CacheTeacherConfig, (), arguments[1:])
        if arguments[0] == "generate":
            assert (capture.teacher, capture.dtype, capture.generate.capture) == (student, "float32", False)
            held_out = "holdout" in step.name
            assert capture.generate.top_p == (1.0 if held_out else 0.9)
            assert capture.data == ("b" if held_out else "a")
        else:
            assert capture.teacher == "t"
            assert (capture.capture.preset == "reference") == ("holdout" in step.name or loss == "policy_gradient")
    assert as_script(steps, SCRIPT_HEAD).count("\n") == len(steps) + 3


def test_benchmarks_are_answered_and_scored_after_each_round() -> None:
    """First, so that what is wrong with them shows before the teacher runs."""
    names = [step.name for step in round_steps(rounds_of("benchmarks=root", "tasks=[gqa,pope]", "rounds=1"))]
    for number in (0, 1):
        assert [name for name in names if name.endswith(f"-{number}")][-5:] == [
            f"answer-{number}",
            f"score-gqa-{number}",
            f"score-pope-{number}",
            f"write-holdout-{number}",
            f"score-holdout-{number}",
        ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("rounds=0",), "rounds is 0: must be at least 1"),
        (("steps=0",), "steps is 0: must be at least 1"),
        (("loss=js",), "loss is 'js': must be one of reverse_kl, forward_kl, policy_gradient"),
        (("loss=policy_gradient", "temperature=0"), "temperature: policy_gradient needs sampled answers"),
        (("temperature=-1",), "temperature is -1: must be 0 or more"),
        (("tasks=[gqa]",), "benchmarks: name both benchmarks and tasks, or neither"),
        (("train=[output=x]",), "train: 'output' is decided by the rounds: remove it"),
        (("write=[fast]",), "write: 'fast' is not a setting: write KEY=VALUE"),
        (("trainer= ",), "trainer: is empty"),
        (("trainer=torchrun 'x",), "trainer: 'torchrun 'x' is not a command line (No closing quotation)"),
        (("holdout=a",), "holdout: is the same set as prompts"),
        (("train=[steps=5]",), "train: 'steps' is decided by the rounds: remove it"),
        (("train=[loss.positions=auto]",), "train: 'loss.positions' is decided by the rounds"),
        (("train=[output =x]",), "train: 'output =x' is not a setting: write KEY=VALUE"),
        (("write=[generate.temperature=0]",), "write: 'generate.temperature' is decided by the rounds"),
        (("write=[generate.capture=true]",), "write: 'generate.capture' is decided by the rounds"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        rounds_of(*settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("write=[generate.topp=1]", "write: unknown setting generate.topp: did you mean generate.top_p?"),
        ("score=[capture.preset=big]", "score: capture.preset"),
        ("train=[optim.lr=fast]", "train: optim.lr is 'fast': must be a number"),
    ],
)
def test_what_the_commands_do_not_take_is_told_before_the_first_runs(setting: str, words: str) -> None:
    check_settings(rounds_of())
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_settings(rounds_of(setting))


def test_another_command_may_train(tmp_path: Path) -> None:
    steps = round_steps(rounds_of("trainer=torchrun --nproc-per-node 2 --no-python train-student"))
    (first, *_) = [step for step in steps if step.name == "train-1"]
    assert first.command[:6] == ("torchrun", "--nproc-per-node", "2", "--no-python", "train-student", "mimic_dense")
