"""Configs: files and arguments over defaults, and one clear line for everything that does not fit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llavamod_offline.config import describe_config, dump_config, load_config, split_arguments
from llavamod_offline.errors import ConfigError


@dataclass(frozen=True)
class Optimiser:
    learning_rate: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])


@dataclass(frozen=True)
class Recipe:
    student: str
    steps: int = 100
    resume: bool = False
    seed: int | None = None
    optimiser: Optimiser = field(default_factory=Optimiser)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps {self.steps}: must be at least 1")


def write(folder: Path, content: str) -> Path:
    file = folder / f"{len(list(folder.iterdir()))}.yaml"
    file.write_text(content)
    return file


def test_later_files_and_arguments_win(tmp_path: Path) -> None:
    first = write(tmp_path, "student: small\nsteps: 5\noptimiser: {learning_rate: 0.1}\n")
    second = write(tmp_path, "steps: 7\nseed: 3\n")
    assert load_config(Recipe, [first, second]) == Recipe("small", 7, False, 3, Optimiser(0.1))
    overrides = ["optimiser.learning_rate=2e-5", "seed=null", "resume=true", "optimiser.betas=[0.5,0.6]"]
    assert load_config(Recipe, [first, second], overrides) == Recipe(
        "small", 7, True, None, Optimiser(2e-5, [0.5, 0.6])
    )


def test_values_may_hold_equals_signs() -> None:
    assert load_config(Recipe, overrides=["student=a=b"]).student == "a=b"


AS_TYPED = ("2024_11_01", "007", "1e3", "10:30", "3.10", "off", "runs/exp #2", "a: b", "[1]", "${steps}", "'x'")


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_is_taken_as_it_is_typed(text: str) -> None:
    """A folder's name is no number, and "#" begins no comment in it."""
    assert load_config(Recipe, overrides=[f"student={text}"]).student == text


@pytest.mark.parametrize(
    "text", [text for text in AS_TYPED if text[0].isalnum() and "#" not in text and " " not in text]
)
def test_text_in_a_file_is_not_converted(tmp_path: Path, text: str) -> None:
    assert load_config(Recipe, [write(tmp_path, f"student: {text}  # a comment\nsteps: 1_0\n")]).student == text


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(Recipe, overrides=["student=~/models/x"]).student == "/home/someone/models/x"
    assert load_config(Recipe, [write(tmp_path, "student: ~/models/x\n")]).student == "/home/someone/models/x"
    assert load_config(Recipe, overrides=["student=a~/b"]).student == "a~/b"


def test_a_reference_to_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config: Interpolation key 'nothing' not found$"):
        load_config(Recipe, [write(tmp_path, "student: ${nothing}\n")])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("stepz=5", "argument 'stepz=5': stepz: .*Did you mean: 'steps'"),
        ("optimiser.learning_rat=1", "learning_rat.*Did you mean: '(optimiser.)?learning_rate'"),
        ("nothing.like.it=1", "nothing"),
        ("steps=many", "argument 'steps=many': steps: "),
        ("steps=1.5", "argument 'steps=1.5': steps: "),
        ("resume=5.5", "resume"),
        ("optimiser=fast", "optimiser"),
        ("steps=null", "steps"),
        ("steps", "argument 'steps': expected an existing YAML file, or key=value"),
        ("steps=[1", "argument"),
        ("steps=0", "steps 0: must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, overrides=["student=small", override])
    assert re.search(problem, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("student: [", "not readable as YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("hello", "unknown key 'hello'"),
        ("student: small\nstepz: 4\n", "Did you mean: 'steps'"),
        ("student: small\nsteps: many\n", "steps: "),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: str, problem: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(Recipe, [file])
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(Recipe, [tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match=r"no value for 'student': set it in a YAML file or as student=VALUE"):
        load_config(Recipe)


def test_a_dumped_config_loads_again(tmp_path: Path) -> None:
    config = Recipe("small", 7, True, 3, Optimiser(0.1))
    assert load_config(Recipe, [write(tmp_path, dump_config(config))]) == config


def test_describe_names_every_key() -> None:
    assert describe_config(Recipe).splitlines() == [
        "student: str = required",
        "steps: int = 100",
        "resume: bool = False",
        "seed: int | None = None",
        "optimiser.learning_rate: float = 0.001",
        "optimiser.betas: list[float] = [0.9, 0.99]",
    ]


def test_split_arguments() -> None:
    assert split_arguments(["a.yaml", "steps=5", "b.yaml", "x.y=z"]) == (
        [Path("a.yaml"), Path("b.yaml")],
        ["steps=5", "x.y=z"],
    )
