"""Failed shards and rejected sequences are retried, and nothing else; the cache is then as if none had failed."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.storage.folders import open_folder
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine, Outcome, Request
from teacher_cache.format.manifest import file_entries
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.work.heartbeat import Heartbeat
from teacher_cache.work.retry import retry, retry_config
from tests.teacher_cache.conftest import World
from tests.teacher_cache.work.test_work import Failing, one


class Rejecting:
    """A teacher that rejects some rows of the set and counts the samples it is given."""

    settings: RecordSettings

    def __init__(self, *rows: int) -> None:
        self._rows = rows
        self.samples: list[int] = []

    def load(self, setup: CaptureSetup) -> CaptureEngine:
        """Load the real teacher that this one wraps."""
        self._engine = setup.load()
        self.settings = self._engine.settings
        return copy.copy(self)

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Reject those rows and capture the others."""
        self.samples += [request.row for request in requests]
        for request in requests:
            if request.row in self._rows:
                yield from (Rejection(item.key, item.role, "no memory") for item in request.sequences)
        yield from self._engine.capture([request for request in requests if request.row not in self._rows])


def test_failed_shards_are_captured_again_with_the_settings_that_were_left(
    world: World, finished: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "c")
    (name,) = one(world, output, engine=Failing({2: 99})).failed
    with Heartbeat(open_folder(output), 60.0), pytest.raises(ConfigError, match="is in use by a worker"):
        retry(retry_config(output, [], []))
    again = Rejecting()
    done = retry(retry_config(output, [], []), load=again.load)
    assert (done.failed_before, done.failed) == ([name], {})
    assert done.capture.digest == open_cache(finished).digest
    assert sorted(again.samples) == list(range(10, 15))
    assert list((tmp_path / "c" / ".work" / "claims").iterdir()) == []


def test_a_shard_that_fails_again_stays_listed(world: World, tmp_path: Path) -> None:
    output = str(tmp_path / "c")
    (name,) = one(world, output, engine=Failing({2: 99})).failed
    done = retry(retry_config(output, [], []), load=Failing({2: 1}).load)
    assert (list(done.failed), done.capture.complete) == ([name], False)
    assert list(one(world, output).failed) == [name]


def test_rejected_sequences_are_tried_alone_and_put_in_their_places(
    world: World, finished: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "c")
    assert one(world, output, engine=Rejecting(3, 4, 21)).capture.totals["rejected"] == 3  # type: ignore[index]
    before = file_entries(tmp_path / "c")
    still = Rejecting(3, 4, 21)
    done = retry(retry_config(output, [], []), load=still.load)
    assert (done.rejected_before, done.recovered, sorted(still.samples)) == (3, 0, [3, 4, 21])
    assert file_entries(tmp_path / "c") == before
    partly = Rejecting(4)
    done = retry(retry_config(output, [], []), load=partly.load)
    assert (done.rejected_before, done.recovered, done.capture.totals["rejected"]) == (3, 2, 1)  # type: ignore[index]
    done = retry(retry_config(output, [], []))
    assert (done.recovered, done.capture.digest) == (1, open_cache(finished).digest)
    assert verify_cache(output).ok


def test_a_shard_that_cannot_be_replaced_stays(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: what was captured before is removed only once the new shard is written."""
    output = str(tmp_path / "c")
    one(world, output, engine=Rejecting(3))
    before = file_entries(tmp_path / "c")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("teacher_cache.write.store.write_columns", full)
        with pytest.raises(CacheError, match="cannot be written: No space left on device"):
            retry(retry_config(output, [], []))
    assert file_entries(tmp_path / "c") == before
    assert verify_cache(output).ok
    assert retry(retry_config(output, [], [])).recovered == 1


def test_a_cache_of_a_run_needs_its_settings(world: World, tmp_path: Path) -> None:
    output = tmp_path / "c"
    world.run(output)
    with pytest.raises(ConfigError, match="no value for 'data', 'teacher'"):
        retry_config(str(output), [], [])
    given = world.arguments(output)[:2]
    done = retry(retry_config(str(output), [], given))
    assert (done.failed_before, done.rejected_before, done.capture.complete) == ([], 0, True)
    with pytest.raises(CacheError, match=r"different settings: capture.seed: was 0, now 1"):
        retry(retry_config(str(output), [], [*given, "capture.seed=1"]))
    (tmp_path / "other").mkdir()
    with pytest.raises(CacheError, match="no capture was begun there"):
        retry(retry_config(str(tmp_path / "other"), [], given))
    with pytest.raises(CacheError, match="no such folder"):
        retry(retry_config(str(tmp_path / "none"), [], given))


def test_a_shard_is_kept_if_what_it_holds_would_be_rejected_now(world: World, tmp_path: Path) -> None:
    one(world, tmp_path / "c", engine=Rejecting(3))
    before = open_cache(tmp_path / "c").digest
    done = retry(load_config(CacheTeacherConfig, (), world.arguments(tmp_path / "c")), load=Rejecting(4).load)
    assert done.recovered == 0
    assert open_cache(tmp_path / "c").digest == before
