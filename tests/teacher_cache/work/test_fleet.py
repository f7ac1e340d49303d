"""Four workers that are killed and stopped at random produce the cache of one undisturbed process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import fork_script
from tests.teacher_cache.conftest import World
from tests.teacher_cache.work.fleet import run_fleet
from tests.tiny import write_tiny_set

SAMPLES, SHARD_SAMPLES, KILLS = 96, 4, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("fleet") / "set", SAMPLES, shard_samples=SHARD_SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["folder", "bucket"])
def test_a_fleet_that_is_killed_at_random_makes_the_cache_of_one_process(
    store: str,
    world: World,
    data: Path,
    bucket: str,
    object_store_variables: dict[str, str],
    tmp_path: Path,
) -> None:
    settings = [f"data={data}", f"teacher={world.teacher}", "batch_size=2"]
    alone = fork_script(["cache-teacher", "run", *settings, f"output={tmp_path / 'one'}", "--json"], tmp_path / "log")
    status, stderr = alone.ended()
    assert status == 0, stderr
    digest = json.loads(alone.stdout.read_text())["digest"]
    output = f"{bucket}/c" if store == "bucket" else str(tmp_path / "c")
    made = run_fleet(
        ["cache-teacher", "work", *settings, f"output={output}"],
        tmp_path / "fleet",
        shards=SAMPLES // SHARD_SAMPLES,
        kills=KILLS,
        pause=1.0,
        lease_seconds=6.0,
        seed=1,
        variables={**object_store_variables, "LLAVAMOD_STAGING": str(tmp_path / "staging")},
    )
    assert made.digest == digest
    assert made.kills == KILLS
    assert len(made.captured) == SAMPLES // SHARD_SAMPLES
    # A worker's shards in progress, one being captured and one being written, are lost with it and redone once.
    assert made.begun.total() - len(made.begun) <= 2 * made.kills
