"""Configs: files and arguments override defaults, and everything that does not fit gets one clear line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llavamod_offline.config import InputPath, load_config, raise_problems, split_arguments
from llavamod_offline.errors import ConfigError


@dataclass(frozen=True)
class Optimiser:
    learning_rate: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])


@dataclass(frozen=True)
class Recipe:
    student: InputPath
    steps: int = 100
    resume: bool = False
    seed: int | None = None
    optimiser: Optimiser = field(default_factory=Optimiser)
    kind: Literal["dense", "sparse"] = "dense"
    weights: dict[str, float] | None = None
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        raise_problems(
            [
                f"{name}: must be at least 1"
                for name in ("steps", "seed")
                if (1 if getattr(self, name) is None else getattr(self, name)) < 1
            ]
        )


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
    """A folder's name is not converted to a number, and a "#" in it does not start a comment."""
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


def test_a_variable_that_the_shell_has_not_replaced_is_no_text() -> None:
    """Typed in single quotes, it would name a folder `${SCRATCH}` in the current one."""
    with pytest.raises(ConfigError, match=r"^student=\$\{SCRATCH\}/x: \$\{SCRATCH\} has no value: let the shell"):
        load_config(Recipe, overrides=["student=${SCRATCH}/x"])


def test_a_reference_to_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^student: Interpolation key 'nothing' not found"):
        load_config(Recipe, [write(tmp_path, "student: ${nothing}\n")])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("stepz=5", r"^unknown setting stepz: did you mean steps\?$"),
        (
            "optimiser.learning_rat=1",
            r"^unknown setting optimiser.learning_rat: did you mean optimiser.lea",
        ),
        ("learning_rate=1", r"^unknown setting learning_rate: did you mean optimiser.learning_rate\?$"),
        ("max_steps=1", r"^unknown setting max_steps: did you mean steps\?$"),
        ("loss.max_steps=1", r"^unknown setting loss.max_steps: did you mean steps\?$"),
        ("betas.first=1", r"^unknown setting betas.first"),
        ("nothing.like.it=1", r"^unknown setting nothing.like.it: --help lists all$"),
        ("=1", r"^unknown setting : --help lists all$"),
        ("steps=many", r"^steps is 'many': must be a whole number$"),
        ("steps=1.5", r"^steps is 1.5: must be a whole number$"),
        ("steps=null", r"^steps is null: must be a whole number$"),
        ("steps=true", r"^steps is true: must be a whole number$"),
        ("steps=[1", r"^steps is '\[1': must be a whole number"),
        ("seed=x", r"^seed is 'x': must be a whole number, or null$"),
        ("resume=5.5", r"^resume is 5.5: must be true or false$"),
        ("kind=moe", r"^kind is 'moe': must be dense or sparse$"),
        ("optimiser=fast", r"^optimiser is a section of settings: write optimiser.learning_rate=fast"),
        ("steps={a: 1}", r"^steps is a single setting, not a section: write steps=a whole number$"),
        ("optimiser.betas=0.5", r"^optimiser.betas takes a list: write optimiser.betas=\[0.5\]$"),
        (
            "optimiser.betas=[a={b: 2}]",
            r"^optimiser.betas is not a list: '\[a=\{b: 2\}\]': quote items that hold brackets",
        ),
        ("optimiser.betas=[a]", r"^optimiser.betas is \['a'\]: must be a list of numbers, such as \[0.5\]$"),
        ("betas=[1,2,3]", r"^betas is \[1, 2, 3\]: must be a list of 2 numbers, such as \[0.5, 0.5\]$"),
        ("weights=[1]", r"^weights is \[1\]: must be a mapping, such as \{name: 0.5\}, or null$"),
        ("student=", r"^student= has no value: write student=VALUE without spaces around '='$"),
        ("seed=", r"^seed= has no value"),
        ("steps", r"^no such config file: steps; to set steps, write steps=VALUE$"),
        (
            "optimiser.betas",
            r"^no such config file: optimiser.betas; to set optimiser.betas, write optimiser.betas=VALUE$",
        ),
        ("some.yaml", r"^no such config file: some.yaml$"),
        ("steps=0", r"^steps: must be at least 1$"),
    ],
)
def test_arguments_that_do_not_fit(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, *split_arguments(["student=small", override]))
    assert re.search(problem, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("student: [", "line 1: not readable as YAML: "),
        ("steps: 1\nsteps: 2\n", "not readable as YAML: .*duplicate key"),
        ("- a\n- b\n", "must hold a mapping"),
        ("hello", "unknown setting hello"),
        ("student: small\nstepz: 4\n", r"unknown setting stepz: did you mean steps\?$"),
        ("student: small\nsteps: many\n", "steps is 'many': must be a whole number$"),
        ("student: small\noptimiser:\n  learning_rate: fast\n", "optimiser.learning_rate is 'fast': must be a number$"),
        ("student: small\noptimiser:\n  rate: 1\n", "unknown setting optimiser.rate: did you mean optimiser.learning"),
        ("student: small\noptimiser: 3\n", "optimiser is a section"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: str, problem: str) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(Recipe, [file])
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^3 settings do not fit: \(1\) steps is 'x'.*; \(2\) resume is.* \(3\) kind"
    ):
        load_config(Recipe, overrides=["student=s", "steps=x", "resume=x", "kind=x"])
    with pytest.raises(ConfigError, match=r"^2 settings .* \(1\) unknown setting stepz.*\(2\) unknown setting kinds"):
        load_config(Recipe, overrides=["student=s", "stepz=1", "kinds=x"])
    with pytest.raises(ConfigError, match=r"\(1\) .*yaml: steps is 'x'.*\(2\) .*yaml: unknown setting kinds"):
        load_config(Recipe, [write(tmp_path, "steps: x\nkinds: y\n")])
    with pytest.raises(ConfigError, match=r"\(1\) steps: must .*\(2\) seed: must"):
        load_config(Recipe, overrides=["student=s", "steps=-1", "seed=-1"])


def test_missing_file_and_missing_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no such config file: .*none\.yaml$"):
        load_config(Recipe, [tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match=r"^no value for 'student': write student=VALUE, or set it in a YAML file$"):
        load_config(Recipe)


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: is a folder, not .*, such as student={tmp_path}$"):
        load_config(Recipe, *split_arguments([str(tmp_path)]))


def test_an_input_beside_the_file_is_not_looked_for_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the current folder; users who expect them to be relative to the file are told so."""
    (tmp_path / "configs" / "small").mkdir(parents=True)
    file = tmp_path / "configs" / "my.yaml"
    file.write_text("student: small\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"student: no small in the current folder, but there is .*configs/small"):
        load_config(Recipe, [file])
    assert load_config(Recipe, [file], ["student=other"]).student == "other"
    (tmp_path / "small").mkdir()
    assert load_config(Recipe, [file]).student == "small"


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"steps: 3\nstudent: \xff\n")
    with pytest.raises(ConfigError, match=r"a.yaml: not UTF-8 text, line 2: save it as UTF-8$"):
        load_config(Recipe, [tmp_path / "a.yaml"])


def test_a_file_with_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a=b.yaml").write_text("student: s\n")
    assert load_config(Recipe, *split_arguments([str(tmp_path / "a=b.yaml")])).student == "s"


def test_split_arguments() -> None:
    assert split_arguments(["a.yaml", "steps=5", "b.yaml", "x.y=z"]) == (
        [Path("a.yaml"), Path("b.yaml")],
        ["steps=5", "x.y=z"],
    )
