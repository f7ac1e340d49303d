"""Answers written by workers on Ray equal those of one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from teacher_cache.format.manifest import file_entries
from tests.teacher_cache.generate.reference import SOURCE_SAMPLES, UNTRAINED, Place
from tests.teacher_cache.ray_cluster import in_a_process
from tests.tiny_families import TINY_FAMILIES

COMMAND = "from teacher_cache.cli.main import main; main()"

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("ray")


def on_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    return in_a_process(COMMAND, "generate", *arguments, "engine.ray=true", "engine.ray_workers=2")


def test_two_workers_give_the_set_and_the_cache_of_one_process(place: Place, greedy: Place) -> None:
    """Also after one process has written a slice; a rerun has nothing to do."""
    place.generate("slice=1/3")
    done = on_ray(*place.arguments(), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["written"] < SOURCE_SAMPLES
    texts = {name: entry for name, entry in file_entries(place.set()).items() if name.endswith(".arrow")}
    assert texts == {name: entry for name, entry in file_entries(greedy.set()).items() if name in texts}
    assert found["digest"] == json.loads((greedy.set() / "set.json").read_text())["digest"]
    assert json.loads((place.cache() / "cache.json").read_text())["totals"]["sequences"] == SOURCE_SAMPLES
    again = json.loads(on_ray(*place.arguments(), "--json").stdout)
    assert (again["written"], again["digest"]) == (0, found["digest"])
    assert not list(place.folder.glob(".*"))


def test_two_workers_write_what_another_family_writes_in_one_process(place: Place, tmp_path: Path) -> None:
    teacher = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    given = (f"teacher={teacher}", *UNTRAINED, "generate.capture=false")
    alone = place.generate(*given, name="alone")
    done = on_ray(*place.arguments(*given), "--json")
    assert done.returncode == 3, done.stderr  # some of an untrained teacher's answers do not end
    found = json.loads(done.stdout)
    assert (found["written"], found["digest"]) == (SOURCE_SAMPLES, alone.digest)


def test_an_error_of_a_worker_is_one_line(place: Place) -> None:
    done = on_ray(*place.arguments("data=nowhere"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
