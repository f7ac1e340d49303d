"""The store: shards appear completely or not at all, in any order, and the result does not depend on the order."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.storage.folders import Folder
from teacher_cache.format.manifest import CACHE_NAME, JOB_NAME, file_entries
from teacher_cache.verify.cache import verify_cache
from teacher_cache.write import store as store_module
from teacher_cache.write.store import CacheStore, write_shard
from tests.teacher_cache.capture.driver import CODEC, FINGERPRINT, NAMES, captured, rejected, write_cache


def _write(path: Path, order: list[str], *, again: bool = False) -> str:
    store = CacheStore.open(path, FINGERPRINT, NAMES)
    store.start()
    for name in order:
        store.commit(name, captured(name), rejected(name), CODEC)
        if again:
            store = CacheStore.open(path, FINGERPRINT, NAMES)
            store.start()
    return str(store.finalise()["digest"])


def _whole(path: Path) -> Path:
    _write(path, NAMES)
    return path


@settings(max_examples=4, deadline=None)
@given(order=st.permutations(NAMES), again=st.booleans())
def test_the_order_of_commits_does_not_matter(
    order: list[str], again: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    assert _write(folder / "a", NAMES) == _write(folder / "b", order, again=again)
    assert file_entries(folder / "a") == file_entries(folder / "b")
    rows = [json.loads(line) for line in (folder / "b" / "rejected.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"{name}-bad" for name in NAMES]


def test_missing_names_what_is_not_committed(tmp_path: Path) -> None:
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    assert not (tmp_path / "c").exists()
    store.start()
    store.commit("s-2", captured("s-2"), [], CODEC)
    assert store.missing() == ["s-0", "s-1", "s-3"]
    assert not store.complete


def test_a_failed_commit_leaves_nothing_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    store.start()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_sequences", full)
        with pytest.raises(
            CacheError, match="No space left on device: free disk space or fix permissions, then rerun to resume"
        ):
            store.commit("s-0", captured("s-0"), [], CODEC)
    assert list((tmp_path / "c" / "shards").iterdir()) == []
    store.commit("s-0", captured("s-0"), [], CODEC)
    assert store.missing() == NAMES[1:]


def test_a_shard_that_another_process_committed_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    store.start()
    store.commit("s-0", captured("s-0"), [], CODEC)
    before = file_entries(tmp_path / "c")
    store.commit("s-0", [], [], CODEC)
    assert file_entries(tmp_path / "c") == before
    assert "another process" in caplog.text


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    store.start()
    shards = tmp_path / "c" / "shards"
    dead = shards / ".s-1.999999999.tmp"
    alive = shards / f".s-1.{os.getppid()}.tmp"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
    store.start()
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.parametrize("there", ["file", "other"])
def test_something_else_at_the_output_is_left_alone(tmp_path: Path, there: str) -> None:
    output = tmp_path / "c"
    if there == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    before = file_entries(tmp_path)
    with pytest.raises(CacheError, match="is not a teacher cache: choose another output"):
        CacheStore.open(output, FINGERPRINT, NAMES)
    assert file_entries(tmp_path) == before


def test_other_settings_are_refused_side_by_side_unless_allowed(tmp_path: Path) -> None:
    _write(tmp_path / "c", NAMES)
    other = {"capture": {"vocab_size": 31, "temperatures": [2.0]}, "data": {"digest": "e" * 64}}
    with pytest.raises(CacheError) as caught:
        CacheStore.open(tmp_path / "c", other, NAMES)
    assert "capture.vocab_size: was 30, now 31; data.digest: was dddddddddddddddd…, now eeee" in str(caught.value)
    with pytest.raises(ConfigError, match=r"allow: capture.vocab_size decides how records are read"):
        CacheStore.open(tmp_path / "c", other, NAMES, allow=["capture.vocab_size", "data"])
    harmless = {**FINGERPRINT, "data": other["data"]}
    assert CacheStore.open(tmp_path / "c", harmless, NAMES, allow=["data"]).missing() == []
    with pytest.raises(CacheError, match="shards: was 4, now 3"):
        CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES[:3])


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CacheStore.open(tmp_path / "file" / "below", FINGERPRINT, NAMES)
    with pytest.raises(CacheError, match="cannot be written: Not a directory"):
        store.start()


@pytest.mark.parametrize("place", ["shards", "shards/s-1"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, place: str) -> None:
    """Before anything is captured, or at the commit if the file appeared in the meantime."""
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    store.start()
    file = tmp_path / "c" / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    problem = rf"c/{place}: is a file, but must be a folder: remove it, or choose another output"
    with pytest.raises(CacheError, match=problem):
        CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    with pytest.raises(CacheError, match=problem):
        store.commit("s-1", captured("s-1"), [], CODEC)
    assert "s-1" in store.missing()
    file.unlink()
    assert write_cache(tmp_path / "c", shards=4) is not None
    assert file_entries(tmp_path / "c") == file_entries(_whole(tmp_path / "whole"))


def test_two_runs_of_other_settings_that_begin_at_once_do_not_make_one_cache(tmp_path: Path) -> None:
    """Both check before either has written."""
    other = {**FINGERPRINT, "capture": {"vocab_size": 31, "temperatures": [2.0]}}
    first, second, third = (CacheStore.open(tmp_path / "c", job, NAMES) for job in (FINGERPRINT, other, FINGERPRINT))
    first.start()
    with pytest.raises(CacheError, match=r"capture.vocab_size: was 30, now 31"):
        second.start()
    third.start()
    assert third.missing() == NAMES


def test_a_job_that_a_store_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has just written it: it can no longer be created, but cannot be read yet either."""
    store = CacheStore.open(tmp_path / "cache", FINGERPRINT, NAMES)
    CacheStore.open(tmp_path / "cache", FINGERPRINT, NAMES).start()
    late, read = ["first", "second"], store.folder.read

    def read_late(name: str) -> bytes:
        if late:
            raise FileNotFoundError(late.pop())
        return read(name)

    monkeypatch.setattr(store.folder, "read", read_late)
    store.start()
    assert not late


def test_cache_json_is_taken_away_before_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    _write(tmp_path / "c", NAMES)
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    store.start()
    assert store.complete
    shutil.rmtree(tmp_path / "c" / "shards" / NAMES[2])
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    assert store.complete
    store.start()
    assert not store.complete


def test_a_damaged_job_says_what_to_do(tmp_path: Path) -> None:
    _write(tmp_path / "c", NAMES)
    sound = (tmp_path / "c" / JOB_NAME).read_text()
    for content in ("{", '{"format_version": 1}', sound.replace("s-2", "s-9"), sound.replace("30", "31")):
        (tmp_path / "c" / JOB_NAME).write_text(content)
        with pytest.raises(CacheError, match=r"job.json: .*run `cache-teacher verify --repair`"):
            CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)


def test_a_shard_without_its_manifest_stops_the_end(tmp_path: Path) -> None:
    _write(tmp_path / "c", NAMES)
    (tmp_path / "c" / CACHE_NAME).unlink()
    (tmp_path / "c" / "shards" / NAMES[1] / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"s-1/manifest.json: missing: run `cache-teacher verify --repair`"):
        CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES).finalise()


def test_a_cache_that_another_process_begins_meanwhile_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check for job.json and the check for other files, as when slices start at once on one output."""
    truly = store_module._occupied

    def occupied(folder: Folder) -> bool:
        monkeypatch.setattr(store_module, "_occupied", truly)
        CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES).start()
        return truly(folder)

    monkeypatch.setattr(store_module, "_occupied", occupied)
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES)
    store.start()
    assert store.missing() == NAMES


def test_who_was_taken_over_while_it_wrote_changes_nothing_of_what_is_committed(bucket: str) -> None:
    """Not even if its own records differ in the last digit."""
    name = NAMES[0]
    late, other = (CacheStore.open(f"{bucket}/c", FINGERPRINT, NAMES) for _ in range(2))
    late.start()

    def fill(folder: Path) -> None:
        own = captured(name)
        half = [replace(item, records=replace(item.records, entropy_N=item.records.entropy_N + 1)) for item in own]
        write_shard(folder, name, half, rejected(name), CODEC)
        for one in NAMES:
            other.commit(one, captured(one), rejected(one), CODEC)
        other.finalise()

    late.add(name, fill)
    assert verify_cache(f"{bucket}/c").ok
