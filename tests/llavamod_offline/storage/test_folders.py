"""Folders on disk and behind URLs behave alike, and errors are one line."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llavamod_offline.errors import ConfigError, StorageError
from llavamod_offline.storage.folders import Folder, LocalFolder, is_url, open_folder
from llavamod_offline.storage.remote import RemoteFolder


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """The same empty folder, on every kind of storage."""
    if request.param == "local":
        return open_folder(tmp_path / "there" / "folder")
    if request.param == "memory":
        monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))
        return open_folder(f"memory://{tmp_path.name}/folder/")
    return open_folder(f"{request.getfixturevalue('bucket')}/deep/folder")


def test_files_come_back_as_they_were_written(folder: Folder) -> None:
    assert folder.names() == set()
    assert folder.sizes() == {}
    folder.write("a.json", b"first")
    folder.write("a.json", b"second")
    assert folder.create("b.json", b"mine")
    assert not folder.create("b.json", b"theirs")
    assert folder.read_all(["b.json", "a.json"]) == [b"mine", b"second"]
    assert folder.names() == {"a.json", "b.json"}
    assert folder.sizes() == {"a.json": 6, "b.json": 4}
    folder.remove_files(["a.json", "never there"])
    assert folder.names() == {"b.json"}
    with pytest.raises(FileNotFoundError):
        folder.read("a.json")


def test_a_folder_is_committed_read_and_removed_whole(folder: Folder) -> None:
    def commit(content: bytes, stray: str | None = None) -> None:
        with folder.commit("shards/one", "last.json") as local:
            (local / "sub" / "deep").mkdir(parents=True)
            (local / "sub" / "deep" / "data").write_bytes(content)
            (local / "last.json").write_bytes(b"last " + content)
            if stray:
                (local / stray).write_bytes(b"")

    commit(b"x" * 10)
    folder.write("shards.txt", b"not in it")
    sizes = {"one/sub/deep/data": 10, "one/last.json": 15}
    assert folder.sizes("shards") == sizes
    with folder.copied("shards/one") as local:
        assert (local / "sub" / "deep" / "data").read_bytes() == b"x" * 10
    with pytest.raises(FileExistsError):
        commit(b"y" * 11)
    if isinstance(folder, LocalFolder):
        assert folder.sizes("shards") == sizes
    folder.remove("shards/one", "last.json")
    assert folder.sizes("shards") == {}
    folder.remove("shards.txt", "last.json")
    assert folder.sizes() == {}


def test_an_error_while_filling_commits_nothing(folder: Folder) -> None:
    def fail() -> None:
        with folder.commit("shards/one", "last.json") as local:
            (local / "data").write_bytes(b"x")
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    assert folder.sizes() == {}


def test_what_another_process_writes_after_a_listing_is_seen(bucket: str) -> None:
    import s3fs

    folder, other = RemoteFolder(bucket), s3fs.S3FileSystem(skip_instance_cache=True)
    folder.write("a", b"short")
    assert folder.sizes() == {"a": 5}
    assert folder.names() == {"a"}
    other.pipe_file(f"{bucket}/a", b"much longer")
    other.pipe_file(f"{bucket}/b", b"new")
    assert folder.read("a") == b"much longer"
    assert folder.size("a") == 11
    assert folder.read_all(["b"]) == [b"new"]


def test_what_a_killed_upload_left_is_replaced(bucket: str) -> None:
    folder = RemoteFolder(bucket)
    folder.write("one/data", b"half of it")
    folder.write("one/stray", b"of another time")
    with folder.commit("one", "last.json") as local:
        (local / "data").write_bytes(b"all of it")
        (local / "last.json").write_bytes(b"{}")
    assert folder.sizes("one") == {"data": 9, "last.json": 2}


def test_a_remote_folder_works_in_a_copy_of_itself(folder: Folder) -> None:
    if isinstance(folder, LocalFolder):
        return
    folder.write("a", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"1"


@pytest.mark.parametrize(
    ("where", "remote"),
    [
        ("s3://b/c", True),
        ("gs://b/c", True),
        ("simplecache::s3://b/c", True),
        ("memory://x", True),
        ("caches/a", False),
        ("/caches/a", False),
        ("c:/caches", False),
        ("file:///tmp/x", False),
        ("local:///tmp/x", False),
        (Path("caches"), False),
    ],
)
def test_urls_are_told_from_paths(where: str | Path, remote: bool) -> None:
    assert is_url(where) == remote
    if not remote:
        folder = open_folder(where)
        assert isinstance(folder, LocalFolder)
        assert str(folder.path) in str(where)


def test_a_missing_bucket_is_named(bucket: str) -> None:
    folder = RemoteFolder(f"{bucket}-not/here")
    calls: list[Callable[[], object]] = [
        folder.names,
        folder.sizes,
        lambda: folder.read("a"),
        lambda: folder.write("a", b""),
        lambda: folder.create("a", b""),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"bucket-.*-not/here: no such bucket: create it") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_missing_credentials_are_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # which holds no configuration
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"a: cannot be read: Unable to locate credentials: check the credentials"):
        RemoteFolder(f"{bucket}/c").read("a")


def test_an_unreachable_server_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LLAVAMOD_RETRY_SECONDS", "0.5")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot be listed: .*127.0.0.1:9.*: check the network") as caught:
        RemoteFolder(f"{bucket}/c").names()
    assert "\n" not in str(caught.value)


def test_what_fails_for_a_while_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After pauses that double, for as long as configured; permanent failures are not retried."""
    from llavamod_offline.storage import remote

    pauses: list[float] = []
    monkeypatch.setattr("llavamod_offline.storage.remote.time.sleep", pauses.append)
    monkeypatch.setattr(remote._jitter, "uniform", lambda low, high: high)
    folder, failures = RemoteFolder("memory://some/folder"), 5

    def action() -> str:
        if len(pauses) < failures:
            raise ConnectionError("reset by peer")
        return "done"

    assert folder._try("x", "read", action) == "done"
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2]
    with pytest.raises(FileNotFoundError):
        folder.read("nothing")
    assert len(pauses) == failures
    monkeypatch.setenv("LLAVAMOD_RETRY_SECONDS", "0")
    pauses.clear()
    with pytest.raises(StorageError, match=r"folder/x: cannot be read: reset by peer: check the network"):
        folder._try("x", "read", action)
    monkeypatch.setenv("LLAVAMOD_RETRY_SECONDS", "soon")
    with pytest.raises(ConfigError, match="LLAVAMOD_RETRY_SECONDS: 'soon' is not a number of seconds"):
        folder.read("x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://b/c", "nosuch://b/c: cannot be opened: Protocol not known: nosuch"),
        ("s3://", "s3://: names no bucket or folder"),
        ("s3://b/c", "s3://b/c: .*: pip install 'llavamod-offline\\[s3\\]'"),
        ("gs://b/c", "gs://b/c: .*: pip install gcsfs"),
    ],
)
def test_a_url_that_cannot_be_opened_says_what_to_do(url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")
    if url.endswith("b/c"):  # as if no extras were installed
        for package in ("s3fs", "gcsfs"):
            monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(registry._registry, "s3", raising=False)
    with pytest.raises(StorageError, match=words) as caught:
        RemoteFolder(url)
    assert "\n" not in str(caught.value)
