"""Reading ahead and writing behind: what overlaps, what waits, and where errors of either surface."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import CacheError, ModelError
from teacher_cache.capture.pipeline import capture_shards
from teacher_cache.capture.shard import Progress
from teacher_cache.capture_setup import CaptureSetup, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.write.store import CacheStore
from tests.teacher_cache.conftest import World

PATIENCE = 300.0  # seconds after which a test that hangs fails


@pytest.fixture
def job(world: World, tmp_path: Path) -> CaptureSetup:
    """A capture of five shards, 24 samples."""
    return prepare_capture(**load_config(CacheTeacherConfig, (), world.arguments(tmp_path / "c")).setup_values)


def test_what_the_teacher_waits_for_is_counted(job: CaptureSetup, tmp_path: Path) -> None:
    """Per shard and in total; a shard's time includes its waits."""
    store = CacheStore.open(tmp_path / "c", job.fingerprint, job.samples.shard_names)
    store.start()
    done = list(capture_shards(job, Refusing(job.settings), store, store.missing(), lambda samples, positions: None))
    assert [item.name for item in done] == job.samples.shard_names
    for item in done:
        assert item.waited["reading"] > 0
        assert sum(item.waited.values()) <= item.seconds
    assert job.waits.total == pytest.approx(sum(sum(item.waited.values()) for item in done))


class Refusing:
    """An engine that captures nothing; `before` is called with each sample's key."""

    def __init__(self, settings: RecordSettings, before: Callable[[str], None] = lambda key: None) -> None:
        self.settings = settings
        self._before = before

    def capture(self, requests: Sequence[Request]) -> Iterator[Rejection]:
        """Reject every sequence."""
        for request in requests:
            self._before(request.sample.key)
            for sequence in request.sequences:
                yield Rejection(request.sample.key, sequence.role, "no")


def with_commit(
    job: CaptureSetup, where: Path, commit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> CacheStore:
    """A store with only its commit replaced."""
    store = CacheStore.open(where, job.fingerprint, job.samples.shard_names)
    monkeypatch.setattr(store, "commit", commit)
    return store


def drain(
    job: CaptureSetup, engine: Refusing, store: CacheStore, progress: Progress = lambda samples, positions: None
) -> int:
    """Capture all shards; return the samples."""
    return sum(done.samples for done in capture_shards(job, engine, store, job.samples.shard_names, progress))


def test_a_shard_is_written_while_the_next_is_captured(
    job: CaptureSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit but the last waits for the teacher to start the following shard."""
    names = job.samples.shard_names
    begun = {name: threading.Event() for name in names}
    committed: list[str] = []

    def before(key: str) -> None:
        begun[names[job.samples.row_of(key) // 5]].set()

    def commit(name: str, *_: Any) -> None:
        for following in names[names.index(name) + 1 :][:1]:
            assert begun[following].wait(PATIENCE)
        committed.append(name)

    store = with_commit(job, tmp_path / "c", commit, monkeypatch)
    assert drain(job, Refusing(job.settings, before), store) == 24
    assert committed == names


def test_no_more_than_one_shard_waits_to_be_written(
    job: CaptureSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit ends after the teacher has started the following shard, and must not see it start another."""
    names = job.samples.shard_names
    begun = [threading.Event() for _ in names]
    finished: list[str] = []
    waiting: list[int] = []

    def before(key: str) -> None:
        row = job.samples.row_of(key)
        if row % 5 == 0:
            waiting.append(row // 5 - len(finished))
            begun[row // 5].set()

    def commit(name: str, *_: Any) -> None:
        later = begun[names.index(name) + 1 :]
        assert all(event.wait(PATIENCE) for event in later[:1])
        if any(event.wait(0.05) for event in later[1:2]):
            for event in begun:
                event.set()  # so that no other commit waits
            pytest.fail("a second shard was begun")
        finished.append(name)

    drain(job, Refusing(job.settings, before), with_commit(job, tmp_path / "c", commit, monkeypatch))
    assert finished == names
    assert waiting == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("failing", [0, 2, 4])
def test_an_error_of_the_writer_stops_the_run_amid_the_next_shard(
    job: CaptureSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    names = job.samples.shard_names
    begun = threading.Event()
    shards: list[int] = []

    class Slow(Refusing):
        """Does not finish the shard after the failing one before the run is stopped."""

        def capture(self, requests: Sequence[Request]) -> Iterator[Rejection]:
            shards.append(requests[0].row // 5)
            if shards[-1] == failing + 1:
                begun.set()
                deadline = time.monotonic() + PATIENCE
                while time.monotonic() < deadline:
                    yield Rejection(requests[0].sample.key, "response", "no")
                pytest.fail("the error was not seen")
            yield from super().capture(requests)

    def commit(name: str, *_: Any) -> None:
        if name == names[failing]:
            assert failing == len(names) - 1 or begun.wait(PATIENCE)
            raise CacheError("the disk is full")

    store = with_commit(job, tmp_path / "c", commit, monkeypatch)
    with pytest.raises(CacheError, match="the disk is full"):
        drain(job, Slow(job.settings), store)
    assert shards == list(range(min(failing + 2, 5)))


def test_what_was_captured_before_the_teacher_failed_is_written(
    job: CaptureSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[str] = []

    def before(key: str) -> None:
        if job.samples.row_of(key) == 11:
            raise ModelError("does not fit")

    store = with_commit(job, tmp_path / "c", lambda name, *_: committed.append(name), monkeypatch)
    with pytest.raises(ModelError, match="does not fit"):
        drain(job, Refusing(job.settings, before), store)
    assert committed == job.samples.shard_names[:2]


def test_progress_counts_every_sample_once(job: CaptureSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    store = with_commit(job, tmp_path / "c", lambda *_: None, monkeypatch)
    drain(job, Refusing(job.settings), store, lambda samples, positions: told.append((samples, positions)))
    assert (sum(samples for samples, _ in told), sum(positions for _, positions in told)) == (24, 0)
