"""Workers that share one output: how they end, and what they leave to others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import CacheError, ConfigError, DataError, LlavaModError, ModelError
from llavamod_offline.storage.folders import open_folder
from llavamod_offline.storage.lock import locked
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine, Outcome, Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.repair import repair_cache
from teacher_cache.work.heartbeat import Heartbeat
from teacher_cache.work.run import WorkSummary, work
from teacher_cache.work.status import read_status
from teacher_cache.write.store import CacheStore
from tests.teacher_cache.conftest import World


class Teacher(Protocol):
    """A stand-in for a teacher, or the real one."""

    def load(self, setup: CaptureSetup) -> CaptureEngine:
        """Load the engine."""
        ...


def one(world: World, output: Path | str, *overrides: str, engine: Teacher | None = None) -> WorkSummary:
    """Work in this process until nothing is left to do."""
    arguments = world.arguments(Path("unused"), *overrides)
    config = load_config(CacheTeacherConfig, (), [*arguments, f"output={output}"])
    if engine is None:
        return work(config, lease_seconds=1.0)
    return work(config, lease_seconds=1.0, load=engine.load)


class Failing:
    """A teacher that fails on some shards a given number of times."""

    settings: RecordSettings

    def __init__(self, times: dict[int, int], error: Exception | None = None) -> None:
        self._left = times
        self._error = error or ModelError("does not fit")

    def load(self, setup: CaptureSetup) -> CaptureEngine:
        """Load the real teacher that this one wraps."""
        self._setup, self._engine = setup, setup.load()
        self.settings = self._engine.settings
        return copy.copy(self)

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Fail in the middle of a shard, or capture it."""
        shard = requests[0].row // 5
        found = self._engine.capture(requests)
        if self._left.get(shard, 0):
            self._left[shard] -= 1
            yield next(found)
            raise self._error
        yield from found


def test_one_worker_makes_the_cache_of_a_run(world: World, finished: Path, tmp_path: Path) -> None:
    done = one(world, tmp_path / "c")
    assert done.capture.complete
    assert (done.capture.digest, done.failed) == (open_cache(finished).digest, {})
    assert list((tmp_path / "c" / ".work" / "claims").iterdir()) == []
    again = one(world, tmp_path / "c")
    assert (again.capture.sequences, again.capture.digest) == (0, done.capture.digest)


def test_a_bucket_is_worked_on_as_a_folder_is(world: World, finished: Path, bucket: str) -> None:
    done = one(world, f"{bucket}/c")
    assert done.capture.digest == open_cache(finished).digest
    found = read_status(f"{bucket}/c")
    assert (found.complete, found.done, found.positions) == (True, 5, done.capture.positions)


def test_a_shard_that_fails_is_tried_again_and_the_cache_is_whole(world: World, finished: Path, tmp_path: Path) -> None:
    done = one(world, tmp_path / "c", engine=Failing({1: 2, 3: 1}))
    assert (done.capture.digest, done.failed) == (open_cache(finished).digest, {})


def test_a_shard_that_keeps_failing_is_listed_and_the_others_are_captured(world: World, tmp_path: Path) -> None:
    done = one(world, tmp_path / "c", engine=Failing({2: 99}))
    assert (done.capture.complete, done.capture.shards_done) == (False, 4)
    (name,) = done.failed
    assert done.failed[name] == "ModelError: does not fit"
    found = read_status(str(tmp_path / "c"))
    assert (found.done, found.failed, found.claimed) == (4, 1, {})
    assert [(item.shard, item.attempts, item.given_up) for item in found.failures] == [(name, 3, True)]
    again = one(world, tmp_path / "c")  # it is not retried automatically
    assert list(again.failed) == [name]


def test_a_worker_at_which_every_shard_fails_ends_with_the_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not fit"):
        one(world, tmp_path / "c", engine=Failing(dict.fromkeys(range(5), 99)))
    found = read_status(str(tmp_path / "c"))
    assert [item.attempts for item in found.failures] == [1, 1, 1]
    assert found.failed == 0


def test_a_worker_that_cannot_write_ends_with_the_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not capture all shards for nothing."""

    def full(*_: object) -> None:
        raise CacheError("no space left")

    monkeypatch.setattr(CacheStore, "commit", full)
    with pytest.raises(CacheError, match="no space left"):
        one(world, tmp_path / "c")
    monkeypatch.undo()
    assert one(world, tmp_path / "c").capture.complete


def test_a_bug_ends_the_worker_with_its_traceback_and_frees_the_shard(
    world: World, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        one(world, tmp_path / "c", engine=Failing({2: 1}, ZeroDivisionError("a bug")))
    (failure,) = read_status(str(tmp_path / "c")).failures
    assert failure.reason == "ZeroDivisionError: a bug"
    assert one(world, tmp_path / "c").capture.digest == open_cache(finished).digest


def test_what_killed_workers_left_half_written_is_removed(world: World, tmp_path: Path) -> None:
    left = [tmp_path / "c" / ".work" / part / ".w.json.999999999.tmp" for part in ("claims", "workers", "done")]
    for file in left:
        file.parent.mkdir(parents=True)
        file.write_text("{")
    assert one(world, tmp_path / "c").capture.complete
    assert not any(file.exists() for file in left)


def test_other_writers_and_workers_keep_each_other_out(world: World, tmp_path: Path) -> None:
    output = tmp_path / "c"
    with locked(output), pytest.raises(ConfigError, match=r"output: .* is in use by process"):
        one(world, output)
    assert not (output / "shards").exists()
    with Heartbeat(open_folder(output), 60.0):
        with pytest.raises(ConfigError, match=r"is in use by a worker, process \d+ on host"):
            world.run(output)
        with pytest.raises(ConfigError, match="is in use by a worker"):
            world.run(output, "slice=0/2")
    assert world.run(output).complete  # the other worker has ended
    with Heartbeat(open_folder(output), 60.0), pytest.raises(ConfigError, match="is in use by a worker"):
        repair_cache(output)


def test_the_limit_of_rejections_holds_across_restarts(world: World, tmp_path: Path) -> None:
    """A worker that a scheduler restarts does not begin to count anew, nor complete what the limit stopped."""
    output = tmp_path / "c"
    for _ in range(3):
        with pytest.raises(DataError, match=r"of 24 sequences rejected, more than max_rejected=0\.01 allows"):
            one(world, output, "max_length=116", "max_rejected=0.01")
    assert not (output / "cache.json").exists()
    assert one(world, output, "max_length=116").capture.complete


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slice=0/2", "config: slice: workers share the shards by themselves"),
        ("engine.ray=true", "config: engine.ray: workers share the shards by themselves"),
        ("output_set=sets/x", "output_set belongs to `cache-teacher generate`"),
        ("capture.attempts=0", "capture.attempts is 0: must be at least 1"),
        ("capture.seed=1", "different settings: capture.seed: was 0, now 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    setting: str, words: str, world: World, finished: Path
) -> None:
    before = sorted(finished.rglob("*"))
    with pytest.raises(LlavaModError, match=words):
        one(world, finished, setting)
    assert sorted(finished.rglob("*")) == before
