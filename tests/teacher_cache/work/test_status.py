"""The status of a cache, read from its store alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.folders import open_folder
from teacher_cache.plan.estimate import Plan, plan_file, write_plan
from teacher_cache.read.reader import open_cache
from teacher_cache.work.claims import Claims
from teacher_cache.work.heartbeat import Heartbeat
from teacher_cache.work.journal import Journal
from teacher_cache.work.status import Status, read_status
from teacher_cache.work.status_view import print_status
from teacher_cache.write.store import CacheStore
from tests.teacher_cache.capture.driver import CODEC, FINGERPRINT, NAMES, captured, rejected
from tests.teacher_cache.conftest import World


def begun(path: Path | str, *names: str) -> CacheStore:
    """A cache of four shards, some of them committed."""
    store = CacheStore.open(path, FINGERPRINT, NAMES)
    store.start()
    for name in names:
        store.commit(name, captured(name), rejected(name), CODEC)
    return store


def shown(status: Status) -> str:
    """The status as printed."""
    stream = io.StringIO()
    print_status(Console(file=stream, width=100, highlight=False, markup=False, _environ={}), status)
    return stream.getvalue()


def test_what_runs_committed_is_counted_as_what_workers_did(tmp_path: Path) -> None:
    """The workers' lists may be incomplete; the manifests supply the rest."""
    store = begun(tmp_path / "c", "s-0", "s-1", "s-2")
    Journal(store.folder, "w").add("s-1")
    found = read_status(str(tmp_path / "c"))
    assert (found.complete, found.shards, found.done, found.failed, found.claimed) == (False, 4, 3, 0, {})
    assert (found.sequences, found.positions, found.rejected) == (9, 9, 3)
    assert found.positions_per_second is None
    store.commit("s-3", captured("s-3"), [], CODEC)
    store.finalise()
    whole = read_status(str(tmp_path / "c"))
    assert (whole.complete, whole.done, whole.positions, whole.bytes) == (
        True,
        4,
        12,
        open_cache(tmp_path / "c").totals["bytes"],
    )
    assert "4 of 4 done (100.0%); complete" in shown(whole)


def test_a_listed_shard_that_was_removed_is_not_counted(tmp_path: Path) -> None:
    store = begun(tmp_path / "c", "s-0", "s-1")
    journal = Journal(store.folder, "w")
    journal.add("s-0")
    journal.add("s-1")
    store.remove("s-1")
    assert read_status(str(tmp_path / "c")).done == 1


def test_live_workers_are_told_from_silent_and_ended_ones(tmp_path: Path) -> None:
    store = begun(tmp_path / "c", "s-0")
    with Heartbeat(store.folder, 60.0) as ended:
        ended.count(positions=30, capturing_seconds=2.0)
    silent, live = Heartbeat(store.folder, 60.0), Heartbeat(store.folder, 60.0)
    for heartbeat, name in ((silent, "s-1"), (live, "s-2")):
        assert Claims(store.folder, heartbeat.worker).take(name, 0)
        heartbeat.tell(state="capturing", holds=[name], attempts=3, gpus=2.0)
        heartbeat.count(positions=100, capturing_seconds=4.0)
        heartbeat._write()
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        live._write()

    found = read_status(str(tmp_path / "c"), pause=pause)
    assert pauses == [6.5]
    states = {line.worker: (line.state, line.renewed) for line in found.workers}
    assert states == {
        ended.worker: ("ended", False),
        silent.worker: ("silent", False),
        live.worker: ("capturing", True),
    }
    assert found.claimed == {"s-2": live.worker}
    assert found.positions_per_second == 25.0
    assert found.seconds_left == round((3 * 4 - 3) / 25, 1)
    assert found.machine_hours > 0
    assert found.gpu_hours > 0
    text = shown(found)
    assert "1 of 4 done (25.0%); 1 claimed, 0 failed, 2 free" in text
    assert "25 positions/s" in text
    assert "1 worker ended before" in text


def test_failures_are_listed_with_reasons_until_they_are_given_up(tmp_path: Path) -> None:
    store = begun(tmp_path / "c", "s-0")
    heartbeat = Heartbeat(store.folder, 60.0)
    heartbeat.tell(attempts=2)
    heartbeat._write()
    claims = Claims(store.folder, heartbeat.worker)
    for attempt in range(2):
        assert claims.take("s-3", attempt)
        claims.end("s-3", "failed", f"DataError: attempt {attempt}")
        found = read_status(str(tmp_path / "c"), pause=lambda seconds: None)
        (failure,) = found.failures
        assert (failure.shard, failure.attempts, failure.given_up) == ("s-3", attempt + 1, attempt == 1)
        assert found.failed == attempt
    text = shown(found)
    assert "shard s-3: failed 2 times, given up: DataError: attempt 1" in text
    assert "`cache-teacher retry" in text


def test_a_shard_that_kills_its_workers_is_listed(tmp_path: Path) -> None:
    store = begun(tmp_path / "c", *NAMES[1:])
    for number in range(15):
        assert Claims(store.folder, f"dead-{number}").take(NAMES[0], number)
    found = read_status(str(tmp_path / "c"), pause=lambda _: None)
    assert [(item.shard, item.attempts) for item in found.failures] == [(NAMES[0], 3)]
    assert found.failures[0].reason == "15 workers died while they captured it"
    assert found.failed == 1


def test_how_long_teachers_wait_is_shown(tmp_path: Path) -> None:
    store = begun(tmp_path / "c", "s-0")
    assert read_status(str(tmp_path / "c")).waiting_share is None
    assert "waiting" not in shown(read_status(str(tmp_path / "c")))
    for seconds, waited in ((30.0, 3.0), (10.0, 0.0)):
        with Heartbeat(store.folder, 60.0) as heartbeat:
            heartbeat.tell(capturing_seconds=seconds, waited_seconds=waited)
    found = read_status(str(tmp_path / "c"))
    assert found.waiting_share == 0.075
    assert sorted(line.waiting_share or 0.0 for line in found.workers) == [0.0, 0.1]
    assert "7.5% of the teachers' time, for images, shards or the disk" in shown(found)


def test_a_plan_beside_the_output_is_shown(tmp_path: Path) -> None:
    begun(tmp_path / "c", "s-0")
    file = plan_file(str(tmp_path / "c"))
    assert file is not None
    settings = {"output": "c", "device": "cuda", "jobs": 1, "samples": 12, "sequences": 12, "positions": 50}
    costs = {"bytes": {"metadata": 9000}, "seconds": {"capture": 7200.0}, "gpu_hours": 2.0, "probe": {}, "presets": {}}
    write_plan(file, Plan(**settings, **costs, positions_error=0.0, rejected=0, fingerprint={}))  # type: ignore[arg-type]
    found = read_status(str(tmp_path / "c"))
    assert found.planned == {"positions": 50, "bytes": 9000, "seconds": 7200.0, "gpu_hours": 2.0}
    assert "50 positions, " in shown(found)
    assert "2 GPU-hours" in shown(found)


def test_status_is_read_from_a_bucket(bucket: str) -> None:
    store = begun(f"{bucket}/c", "s-0", "s-2")
    Journal(store.folder, "w").add("s-2")
    with Heartbeat(open_folder(f"{bucket}/c"), 60.0):
        pass
    found = read_status(f"{bucket}/c")
    assert (found.done, found.positions, len(found.workers)) == (2, 6, 1)


def test_what_is_no_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="c': no such folder"):
        read_status(str(tmp_path / "c"))
    with pytest.raises(CacheError, match=r"': job.json is missing, so it is not a cache: check the path"):
        read_status(str(tmp_path))


def test_the_command_prints_one_json_object(world: World, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from teacher_cache.cli.work import status

    status(str(finished), watch=True, as_json=True)  # watching ends once the cache is finished
    found = json.loads(capsys.readouterr().out)
    assert (found["complete"], found["done"], found["shards"]) == (True, 5, 5)
