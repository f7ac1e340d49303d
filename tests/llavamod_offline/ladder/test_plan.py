"""The ladder's commands produce every row of its table, with equal data and steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.demo.scheduler import longest_first
from llavamod_offline.ladder.plan import ladder_steps, step_name
from llavamod_offline.ladder.table import CACHES, CLAIMS, ROWS, RUNS, TEACHER
from teacher_cache.config import CacheTeacherConfig
from train.config.recipes import resolve_config

BOTH = [step for seed in (1, 2) for step in ladder_steps(seed, quick=True)]
STEPS = {step.name: step for step in BOTH}


def _settings(name: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in STEPS[name].command if "=" in part)


def test_names_are_unique_and_needs_are_met() -> None:
    assert len(STEPS) == len(BOTH)
    assert len(longest_first(BOTH)) == len(BOTH)
    for parts in (CACHES, RUNS, CLAIMS):
        assert len({part.name for part in parts}) == len(parts)


def test_every_row_is_trained_answered_with_scored_and_measured() -> None:
    runs = {run.name for run in RUNS}
    named = {row.run for row in ROWS}
    assert named <= runs
    assert len(named) == len(ROWS)
    for row in ROWS:
        assert row.compared_with is None or row.compared_with in named
        for what in ("train", "answer", "measure"):
            assert step_name(2, f"{what}-{row.run}") in STEPS
    for claim in CLAIMS:
        assert {claim.row, claim.than} <= named | {TEACHER}


@pytest.mark.parametrize("run", [run.name for run in RUNS])
def test_every_training_is_a_valid_command_that_reads_its_own_seed(run: str) -> None:
    words = STEPS[step_name(2, f"train-{run}")].command
    config = resolve_config(list(words[1:]))
    assert config.seed == 2
    assert all(path.parts[0] == "seed-2" for path in map(Path, (config.output, config.data.set)))
    assert config.cache.path is None or Path(str(config.cache.path)).parts[0] == "seed-2"


@pytest.mark.parametrize("cache", [cache.name for cache in CACHES])
def test_every_capture_is_a_valid_command(cache: str) -> None:
    config = load_config(CacheTeacherConfig, (), STEPS[step_name(1, f"cache-{cache}")].command[2:])
    assert config.output == f"seed-1/caches/{cache}"


def test_compared_rows_have_the_same_samples_steps_and_rates() -> None:
    parents = {run.name: run.parent for run in RUNS}

    def seen(run: str | None) -> list[tuple[str, str, str, str]]:
        if run is None:
            return []
        given = _settings(step_name(1, f"train-{run}"))
        return [(given["data.set"], given["steps"], given["batch.global_size"], given["seed"]), *seen(parents[run])]

    for row in ROWS:
        if row.compared_with is not None and "Preference" not in row.group:
            assert seen(row.run) == seen(row.compared_with), row.name
    for claim in CLAIMS:
        if TEACHER not in (claim.row, claim.than) and claim.name != "preference_below_start":
            assert seen(claim.row) == seen(claim.than), claim.name


def test_a_cache_that_a_run_reads_is_of_its_set() -> None:
    data = {cache.name: cache.data for cache in CACHES}
    for run in RUNS:
        assert run.cache is None or data[run.cache] == run.data
