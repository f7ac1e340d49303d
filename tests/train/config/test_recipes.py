"""Where a run's settings come from: the recipe named on the command line or in a file, and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from llavamod_offline.errors import ConfigError
from train.config import CACHED_STAGES, Stage
from train.config.recipes import changes_to_recipe, resolve_config

GIVEN = ("data.set=s", "output=o", "student.checkpoint=c")


def write(folder: Path, content: str, name: str = "my.yaml") -> str:
    (folder / name).write_text(content)
    return str(folder / name)


@pytest.mark.parametrize("stage", get_args(Stage))
def test_a_file_that_names_a_stage_starts_from_its_recipe(stage: str, tmp_path: Path) -> None:
    given = [*GIVEN, *(["cache.path=x"] if stage in CACHED_STAGES else [])]
    file = write(tmp_path, f"stage: {stage}\noptim:\n  weight_decay: 0.1\n")
    assert resolve_config([file, *given]) == resolve_config([stage, *given, "optim.weight_decay=0.1"])
    assert resolve_config([f"stage={stage}", *given]) == resolve_config([stage, *given])
    unnamed = write(tmp_path, "optim: {weight_decay: 0.1}\n", "unnamed.yaml")
    assert resolve_config([unnamed, f"stage={stage}", *given]) == resolve_config([file, *given])
    assert resolve_config([stage, unnamed, *given]) == resolve_config([file, *given])


def test_another_recipe_of_the_stage_may_be_named_before_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "stage: mimic_dense\nsteps: 5\n")
    config = resolve_config(["mimic_dense_aligned", file, *GIVEN, "cache.path=x"])
    assert (config.loss.align.relation_weight, config.steps) == (0.5, 5)


def test_no_stage_and_two_stages_are_one_line(tmp_path: Path) -> None:
    sft, none = write(tmp_path, "stage: sft\n", "sft.yaml"), write(tmp_path, "steps: 3\n", "none.yaml")
    for arguments, problem in (
        ([none, *GIVEN], f"{none}: names no stage: add 'stage: "),
        ([*GIVEN], "no recipe: name one first, as in 'train-student sft "),
        (["align", sft, *GIVEN], f"recipe align names stage align, but {sft} names sft: choose one of them"),
        ([sft, *GIVEN, "stage=align"], f"{sft} names stage sft, but 'stage=align' names align: choose one of them"),
        (
            [write(tmp_path, "stage: sfft\n", "typo.yaml"), *GIVEN],
            "typo.yaml: stage is 'sfft': must be one of align, mimic_dense,",
        ),
        ([write(tmp_path, "stage:\n"), *GIVEN], "names no stage"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve_config(arguments)
        assert problem in str(caught.value)


def test_all_conflicts_of_a_dense_preference_run_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(["preference", *GIVEN, "cache.path=x", "student.kind=dense"])
    problem = str(caught.value)
    assert problem.startswith("3 settings do not fit: (1) ")
    for remedy in ("loss.router_aux_coef: ", "set it to 0", "remove 'router'", "student.capacity_factor: ", "to null"):
        assert remedy in problem


def test_what_differs_from_the_recipe_is_listed(tmp_path: Path) -> None:
    file = write(tmp_path, "stage: mimic_sparse\noptim: {lr: 1e-4}\nbatch: {micro_size: 1}\nstudent: {upcycle: null}\n")
    assert changes_to_recipe([file, *GIVEN, "cache.path=x", "trainable=[mlp]"]) == (
        "recipe mimic_sparse, changed: student.upcycle=null (was set), optim.lr=0.0001 (was 2.0e-05), "
        "trainable=[mlp] (was [projector, mlp, router])"
    )
    assert changes_to_recipe(["sft", *GIVEN]) == "recipe sft"
    assert (
        changes_to_recipe(["sft", *GIVEN, "data.weights={a: 2}"])
        == "recipe sft, changed: data.weights={a: 2.0} (was null)"
    )
