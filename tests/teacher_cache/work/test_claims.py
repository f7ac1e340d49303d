"""Claims: one owner at a time, taken over by a worker that saw no renewal for a lease, whatever any clock says."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.folders import Folder, open_folder
from teacher_cache.work.claims import Claims, clear_claims, histories, read_endings
from teacher_cache.work.heartbeat import Heartbeat, Watch, all_workers, check_no_workers, read_workers
from teacher_cache.work.shard_queue import ShardQueue
from teacher_cache.write.store import CacheStore
from tests.teacher_cache.capture.driver import CODEC, FINGERPRINT, NAMES, captured, rejected
from tests.teacher_cache.capture.killer import fork_server

LEASE = 60.0


@pytest.fixture(params=["folder", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    where = str(tmp_path) if request.param == "folder" else request.getfixturevalue("bucket")
    return open_folder(f"{where}/c")


class Clock:
    """A monotonic clock that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue_of(tmp_path: Path, clock: Clock) -> Callable[[str], ShardQueue]:
    """A function that gives a named worker's queue on one cache of four shards."""

    def made(worker: str) -> ShardQueue:
        store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
        store.start()
        claims, watch = Claims(store.folder, worker), Watch(store.folder, LEASE, clock)
        return ShardQueue(store, NAMES, claims, watch, worker, attempts=3, clock=clock)

    return made


@pytest.fixture
def other(tmp_path: Path) -> Heartbeat:
    """A live worker, whose heartbeat a test renews at will."""
    return Heartbeat(open_folder(tmp_path / "c"), LEASE)


def claim_at_once(where: str, worker: str, variables: dict[str, str], ready: Connection) -> None:
    """Claim a shard when told to, and report whether the claim succeeded."""
    os.environ.update(variables)
    claims = Claims(open_folder(where), worker)
    ready.send(None)
    ready.recv()
    ready.send(claims.take("s~1", 0))


def test_one_of_many_processes_that_claim_at_once_gets_the_shard(
    folder: Folder, object_store_variables: dict[str, str]
) -> None:
    context, pipes, names = fork_server(), [], [f"w{number}" for number in range(6)]
    for name in names:
        here, there = context.Pipe()
        context.Process(target=claim_at_once, args=(folder.where, name, object_store_variables, there)).start()
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(None)
    taken = [pipe.recv() for pipe in pipes]
    assert sorted(taken) == [False] * 5 + [True]
    assert Claims(folder, "any").worker_of("s~1", 1) == names[taken.index(True)]


def test_who_was_taken_over_learns_it_and_what_is_committed_leaves_no_claims(folder: Folder) -> None:
    slow, quick = Claims(folder, "slow"), Claims(folder, "quick")
    assert slow.take("s", 0)
    assert quick.take("s", 1)
    assert (slow.is_mine("s"), quick.is_mine("s")) == (False, True)
    quick.clear("s")
    assert histories(folder) == {}
    assert not slow.is_mine("s")


def test_endings_say_who_failed_and_why(folder: Folder) -> None:
    first, second = Claims(folder, "first"), Claims(folder, "second")
    first.take("s", 0)
    first.end("s", "failed", "DataError: ünread\nable")
    second.take("s", 1)
    second.end("s", "released")
    found = histories(folder)
    read_endings(folder, found)
    assert (found["s"].latest, found["s"].is_held) == (2, False)
    assert [(item.worker, item.reason) for item in found["s"].failures] == [("first", "DataError: ünread\nable")]
    assert found["s"].attempts(dead=False) == 1
    clear_claims(folder, ["s"], found)
    assert histories(folder) == {}


def test_a_worker_is_silent_after_a_lease_without_renewals_as_the_watcher_counts_it(
    tmp_path: Path, clock: Clock, other: Heartbeat
) -> None:
    watch = Watch(open_folder(tmp_path / "c"), LEASE, clock)
    other._write()
    for _ in range(40):  # far beyond a lease
        clock.now += LEASE / 12
        other._write()
        watch.look([other.worker])
        assert not watch.is_silent(other.worker)
    looks = 0
    while not watch.is_silent(other.worker):
        clock.now += LEASE / 12
        watch.look([other.worker])
        looks += 1
    assert looks == 12
    other._write()
    watch.look([other.worker])
    assert not watch.is_silent(other.worker)


def test_a_watcher_that_slept_takes_nobody_for_dead(tmp_path: Path, clock: Clock, other: Heartbeat) -> None:
    """It and the worker may have slept at the same time, as on a suspended machine."""
    watch = Watch(open_folder(tmp_path / "c"), LEASE, clock)
    other._write()
    watch.look([other.worker])
    clock.now += 100 * LEASE
    watch.look([other.worker])
    assert not watch.is_silent(other.worker)


def test_a_worker_that_said_that_it_ended_is_not_waited_for(tmp_path: Path, clock: Clock) -> None:
    folder = open_folder(tmp_path / "c")
    with Heartbeat(folder, LEASE) as heartbeat:
        pass
    watch = Watch(folder, LEASE, clock)
    watch.look([heartbeat.worker])
    assert watch.is_silent(heartbeat.worker)
    assert all_workers(folder) == [heartbeat.worker]
    assert [state and state.has_ended for state in read_workers(folder, [heartbeat.worker, "other"])] == [True, None]


def test_workers_share_the_shards_and_take_over_those_of_the_dead(
    queue_of: Callable[[str], ShardQueue], clock: Clock
) -> None:
    dead, live = queue_of("dead"), queue_of("live")
    mine = next(dead.take())
    others = list(live.take())
    assert sorted([mine, *others]) == NAMES
    assert live.left == "waiting"
    for _ in range(11):
        clock.now += LEASE / 12
        assert list(live.take()) == []
    clock.now += LEASE / 12
    assert list(live.take()) == [mine]
    assert not dead._claims.is_mine(mine)


def test_released_shards_are_free_at_once_and_committed_ones_never(queue_of: Callable[[str], ShardQueue]) -> None:
    first, second = queue_of("first"), queue_of("second")
    taken = list(first.take())
    for name in taken[:2]:
        first._claims.end(name, "released")
    for name in taken[2:]:
        first._store.commit(name, captured(name), rejected(name), CODEC)
        first._claims.clear(name)
    assert sorted(second.take()) == sorted(taken[:2])
    for name in taken[:2]:
        second._store.commit(name, captured(name), rejected(name), CODEC)
        second._claims.clear(name)
    assert (list(first.take()), first.left) == ([], "nothing")


def test_a_shard_that_failed_goes_to_others_first_and_is_given_up_after_three_attempts(
    queue_of: Callable[[str], ShardQueue], clock: Clock, other: Heartbeat
) -> None:
    first = queue_of("first")
    for name in (taken := list(first.take()))[1:]:
        first._store.commit(name, captured(name), rejected(name), CODEC)
        first._claims.clear(name)
    bad = taken[0]
    first._claims.end(bad, "failed", "no")
    other._write()
    assert (list(first.take()), first.left) == ([], "waiting")  # the other worker is alive and has not failed the shard
    second = queue_of(other.worker)
    assert list(second.take()) == [bad]
    second._claims.end(bad, "failed", "no")
    assert next(first.take()) == bad  # all live workers have failed it
    first._claims.end(bad, "failed", "still no")
    for queue in (first, second):
        assert list(queue.take()) == []
        assert queue.left == "failed"
        assert [ending.reason for ending in queue.failed[bad].failures] == ["no", "no", "still no"]


def test_a_shard_that_kills_workers_is_given_up_in_the_end(queue_of: Callable[[str], ShardQueue], clock: Clock) -> None:
    """Several deaths count as one failure, since most deaths are the machine's fault."""
    store = queue_of("any")._store
    for number in range(15):
        assert Claims(store.folder, f"dead-{number}").take("s-2", number)
    queue = queue_of("live")
    for name in queue.take():
        queue._store.commit(name, captured(name), rejected(name), CODEC)
        queue._claims.clear(name)
    for _ in range(12):
        clock.now += LEASE / 12
        list(queue.take())
    assert queue.left == "failed"
    assert list(queue.failed) == ["s-2"]


def test_a_claim_of_which_the_reply_was_lost_is_held(
    queue_of: Callable[[str], ShardQueue], tmp_path: Path, clock: Clock
) -> None:
    """The worker that made it captures the shard instead of waiting for itself."""
    folder, queue = open_folder(tmp_path / "c"), queue_of("me")
    assert Claims(folder, "me").take("s-2", 0)  # without the queue's knowledge
    taken = []
    for name in queue.take():
        CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES).commit(name, captured(name), rejected(name), CODEC)
        taken.append(name)
    assert sorted(taken) == sorted(NAMES)
    assert queue.left == "nothing"


def test_a_put_whose_reply_was_lost_is_held(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs resends the request by itself, and is told that the object exists."""
    client: Any = importlib.import_module("aiobotocore.client").AioBaseClient
    closed: Any = importlib.import_module("botocore.exceptions").ConnectionClosedError
    send, lost = client._make_api_call, list[str]()

    async def losing(self: Any, operation: str, settings: dict[str, str]) -> object:
        reply = await send(self, operation, settings)
        if operation == "PutObject" and "claims" in settings["Key"] and not lost:
            lost.append(settings["Key"])
            raise closed(endpoint_url="x")
        return reply

    monkeypatch.setattr(client, "_make_api_call", losing)
    folder = open_folder(f"{bucket}/c")
    assert Claims(folder, "me").take("s-1", 0)
    assert lost
    assert not Claims(folder, "other").take("s-1", 0)


def test_a_worker_of_a_newer_version_lives(tmp_path: Path, clock: Clock, other: Heartbeat) -> None:
    watch = Watch(open_folder(tmp_path / "c"), LEASE, clock)
    file = tmp_path / "c" / ".work" / "workers" / f"{other.worker}.json"
    for _ in range(30):
        other._write()
        file.write_text(json.dumps(json.loads(file.read_text()) | {"new": 1, "owner": {"host": "h", "new": 2}}))
        watch.look([other.worker])
        clock.now += 5
    assert not watch.is_silent(other.worker)

    def renew(seconds: float) -> None:
        other._write()

    with pytest.raises(ConfigError, match="is in use by a worker"):
        check_no_workers(tmp_path / "c", pause=renew)


@pytest.mark.parametrize("content", ["{", '{"worker": "w", "host": "h", "how": "failed", "reason": "x", "more": 1}'])
def test_damaged_and_newer_endings_are_read(folder: Folder, content: str) -> None:
    folder.create(".work/claims/s-1~1~ended", content.encode())
    there = histories(folder)
    read_endings(folder, there)
    assert [item.how for item in there["s-1"].endings] == ["failed"]


@pytest.mark.parametrize("lease", [0.5, float("inf"), float("nan")])
def test_a_lease_must_be_a_time(tmp_path: Path, lease: float) -> None:
    with pytest.raises(ConfigError, match=r"--lease is .*: must be at least 1 second, and finite"):
        Heartbeat(open_folder(tmp_path / "c"), lease)
