"""What the demo shows: every model that it compares is made, answered with and scored."""

from __future__ import annotations

from pathlib import Path

from llavamod_offline.demo.plan import FULL, QUICK, TASKS, demo_steps, models


def _settings(command: tuple[str, ...]) -> dict[str, str]:
    return dict(part.split("=", 1) for part in command if "=" in part)


def test_every_model_is_trained_answered_with_and_scored(tmp_path: Path) -> None:
    for sizes in (FULL, QUICK):
        steps = {step.name: step for step in demo_steps(tmp_path, sizes)}
        for model in models(tmp_path):
            if model.run is not None:
                assert _settings(steps[f"train-{model.slug}"].command)["output"] == str(model.run)
                assert steps[f"answer-{model.slug}"].needs == (f"train-{model.slug}",)
            assert _settings(steps[f"answer-{model.slug}"].command)["model"] == str(model.checkpoint)
            assert {f"score-{model.slug}-{task}" for task in TASKS} <= steps.keys()


def test_two_students_of_different_make_share_a_cache(tmp_path: Path) -> None:
    steps = {step.name: step for step in demo_steps(tmp_path, FULL)}
    one, other = (_settings(steps[f"train-{slug}"].command) for slug in ("mimic_dense", "smaller"))
    assert one["cache.path"] == other["cache.path"]
    assert one["data.set"] == other["data.set"]
    assert "student.checkpoint" in one
    assert "student.language_model" in other
