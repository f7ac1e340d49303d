"""A tiny teacher, two packed sets and a finished cache of each, made once for all tests in this folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.sets.sample_set import SampleSet
from teacher_cache.capture.run import run_capture
from teacher_cache.capture.summary import Summary
from teacher_cache.config import CacheTeacherConfig
from tests.teacher_cache.generate.reference import SOURCE_SAMPLES, Place, write_prompts
from tests.tiny import write_tiny_llava, write_tiny_set

FLOAT32 = "capture.precision=exact"


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Count the reads of each tar member from now on, by set and place."""
    reads: Counter[tuple[str, int]] = Counter()
    read = SampleSet._read_bytes

    def counted(samples: SampleSet, ordinal: int, member: dict[str, Any], where: str, scattered: bool) -> bytes:
        reads[f"{samples.path} {ordinal}", member["offset"]] += 1
        return read(samples, ordinal, member, where, scattered)

    monkeypatch.setattr(SampleSet, "_read_bytes", counted)
    return reads


@dataclass(frozen=True)
class World:
    """The paths of the session's teacher and sets; `run` captures a set with overrides."""

    teacher: Path
    samples: Path
    pairs: Path

    def arguments(self, output: Path, *overrides: str, data: Path | None = None) -> list[str]:
        """A capture's settings as `key=value` command-line arguments."""
        return [f"data={data or self.samples}", f"teacher={self.teacher}", f"output={output}", *overrides]

    def run(self, output: Path, *overrides: str, data: Path | None = None, allow: tuple[str, ...] = ()) -> Summary:
        """Capture in this process."""
        return run_capture(
            load_config(CacheTeacherConfig, (), self.arguments(output, *overrides, data=data)), allow=allow
        )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("teacher-cache")
    return World(
        teacher=write_tiny_llava(folder / "teacher"),
        samples=write_tiny_set(folder / "samples", 24, shard_samples=5),
        pairs=write_tiny_set(folder / "pairs", 7, preference=True, shard_samples=4),
    )


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of the samples; tests must not change it."""
    output = tmp_path_factory.mktemp("finished") / "cache"
    world.run(output)
    return output


@pytest.fixture(scope="session")
def small(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of two shards with a few sequences each; tests must not change it."""
    folder = tmp_path_factory.mktemp("small")
    world.run(folder / "cache", data=write_tiny_set(folder / "set", 4, shard_samples=2))
    return folder / "cache"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[[], Path]:
    """A function that makes fresh copies of the finished cache, to be damaged."""
    import shutil

    def copy() -> Path:
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(finished, target))

    return copy


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of prompts about toy scenes."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts")


@pytest.fixture
def place(prompts: Path, tmp_path: Path) -> Place:
    """A place where a test may let the toy teacher answer the prompts."""
    return Place(prompts, tmp_path)


@pytest.fixture(scope="session")
def greedy(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Greedy answers to the last turns; tests must not change them."""
    made = Place(prompts, tmp_path_factory.mktemp("greedy"))
    done = made.generate()
    assert (done.samples, done.rejected, done.written, done.retokenised) == (SOURCE_SAMPLES, 0, SOURCE_SAMPLES, 0)
    assert done.capture is not None
    assert (done.capture.sequences, done.capture.rejected, done.capture.complete) == (SOURCE_SAMPLES, 0, True)
    return made
