"""The demo's plan: every model that it compares is trained, generates answers and is scored."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from llavamod_offline.demo.commands import as_script
from llavamod_offline.demo.plan import SCRIPT_HEAD, TASKS, demo_steps, models


def test_the_script_repeats_the_demo_in_an_empty_folder(tmp_path: Path) -> None:
    """Its commands need only what earlier ones or the package provide; the first few are run."""
    steps = demo_steps(quick=True, seed=3)
    script = as_script(steps, SCRIPT_HEAD).splitlines()
    assert script[3:] == [step.typed for step in steps]
    made = {Path(name) for name in ("world", "benchmarks", "small_language_model")}
    for step in steps[1:]:
        words = [part.split("=", 1)[-1] for part in step.command[1:]]
        flags = dict(pairwise(step.command))
        target = _settings(step.command).get("output", flags.get("--output"))
        for path in map(Path, words):
            if "/" in str(path) and str(path) != target:
                assert path.is_absolute() or any(folder in (path, *path.parents) for folder in made), step.typed
        assert target is not None
        assert not Path(target).is_absolute()
        made.add(Path(target))
    first = tmp_path / "commands.sh"
    first.write_text("\n".join([*script[:3], script[3], next(line for line in script if " pack " in line)]))
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "commands.sh"], cwd=tmp_path, env={**os.environ, "PATH": scripts}, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {*map(str, made), "sets", "commands.sh"} & {
        "world", "benchmarks", "small_language_model", "sets", "commands.sh",
    }  # fmt: skip


def _settings(command: tuple[str, ...]) -> dict[str, str]:
    return dict(part.split("=", 1) for part in command if "=" in part)


def test_every_model_is_trained_answered_with_and_scored() -> None:
    for quick in (False, True):
        steps = {step.name: step for step in demo_steps(quick=quick)}
        for model in models(Path()):
            if model.run is not None:
                assert _settings(steps[f"train-{model.slug}"].command)["output"] == str(model.run)
                assert steps[f"answer-{model.slug}"].needs == (f"train-{model.slug}",)
            assert _settings(steps[f"answer-{model.slug}"].command)["model"] == str(model.checkpoint)
            assert {f"score-{model.slug}-{task}" for task in TASKS} <= steps.keys()


def test_two_students_of_different_make_share_a_cache() -> None:
    steps = {step.name: step for step in demo_steps()}
    one, other = (_settings(steps[f"train-{slug}"].command) for slug in ("mimic_dense", "smaller"))
    assert one["cache.path"] == other["cache.path"]
    assert one["data.set"] == other["data.set"]
    assert "student.checkpoint" in one
    assert "student.language_model" in other
