"""Tars behind a URL are indexed in one pass, and the set then reads them there."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources.source_arguments import parse_source
from llavamod_offline.data.tars.tar_index import TarSource, find_tars, index_tars
from llavamod_offline.errors import DataError, StorageError
from llavamod_offline.storage.remote import RETRY_VARIABLE
from llavamod_offline.storage.remote_file import RemoteFile
from tests.llavamod_offline.data.sources.source_files import JPG, PNG
from tests.llavamod_offline.data.tars.foreign_tars import row, write_tar
from tests.llavamod_offline.data.tars.test_tar_index import read_all
from tests.web_server import web_server


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars with captions, classes and rows."""
    folder = tmp_path / "www" / "cc3m"
    folder.mkdir(parents=True)
    for part in range(2):
        members = [
            (f"{part}a.jpg", JPG), (f"{part}a.json", b'{"similarity": 0.3}'), (f"{part}a.txt", b"A circle."),
            (f"{part}b.cls", b"7"), (f"{part}b.png", PNG),
            (f"{part}c.json", row("<image> or <image>?", "Both.")), (f"{part}c.0.jpg", JPG), (f"{part}c.1.png", PNG),
            (f"{part}d.txt", b"No image."),
        ]  # fmt: skip
        write_tar(folder / f"cc3m-00000{part}.tar", members)
    return folder


@pytest.fixture(autouse=True)
def _own_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))
    monkeypatch.setenv(RETRY_VARIABLE, "0")


def index(sources: list[TarSource], output: Path, workers: int = 1) -> SampleSet:
    index_tars(sources, output, caption_prompt="What is it?", workers=workers)
    return SampleSet.open(output)


@pytest.mark.parametrize("workers", [1, 2])
def test_tars_of_a_web_server(tars: Path, tmp_path: Path, workers: int) -> None:
    """Each is requested once; nothing of it is kept locally until it is read."""
    local = index(find_tars([tars]), tmp_path / "local")
    with web_server(tars.parent) as server:
        urls = [RemoteFile(f"{server.url}/cc3m/cc3m-00000{part}.tar") for part in range(2)]
        remote = index(find_tars(urls), tmp_path / "remote", workers)
        sizes = {f"cc3m/{tar.name}": tar.stat().st_size for tar in tars.iterdir()}
        assert dict(server.sent) == sizes
        assert set(server.gets.values()) == {1}
        assert not [path for path in (tmp_path / "staging").rglob("*") if path.is_file()]
        assert (remote.digest, remote.keys) == (local.digest, local.keys)
        assert read_all(tmp_path / "remote") == read_all(tmp_path / "local")
        assert remote.origin("1c") == (f"{server.url}/cc3m/cc3m-000001.tar", 5)
    assert [sample.turns[-1].text for sample in read_all(tmp_path / "local")[:2]] == ["A circle.", "7"]
    rejected = [json.loads(line) for line in (tmp_path / "remote" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["key"], line["file"][-11:]) for line in rejected] == [("0d", "-000000.tar"), ("1d", "-000001.tar")]


def test_tars_of_a_bucket(tars: Path, tmp_path: Path, bucket: str) -> None:
    fsspec.filesystem("s3").put(f"{tars}/", f"{bucket}/cc3m", recursive=True)
    local = index(find_tars([tars]), tmp_path / "local")
    remote = index(find_tars([RemoteFile(f"{bucket}/cc3m")]), tmp_path / "remote")
    assert (remote.digest, remote.is_remote) == (local.digest, True)
    assert read_all(tmp_path / "remote") == read_all(tmp_path / "local")
    assert remote.manifest["sources"] == {"cc3m": 6}
    with pytest.raises(DataError, match=r"no \.tar in this folder, or it cannot be listed: name its tars one by one"):
        find_tars([RemoteFile(f"{bucket}/none")])


def test_what_cannot_be_had_is_named(tars: Path, tmp_path: Path) -> None:
    with web_server(tars.parent) as server:
        known, lost = (RemoteFile(f"{server.url}/cc3m/{name}.tar") for name in ("cc3m-000000", "lost"))
        with pytest.raises(StorageError, match=r"lost\.tar: no such file, or its server"):
            index(find_tars([known, lost]), tmp_path / "set")
        with pytest.raises(DataError, match="is given twice"):
            index(find_tars([known, known]), tmp_path / "set")
        with pytest.raises(DataError, match=r"its name must end in \.tar; a compressed tar must be unpacked"):
            index(find_tars([RemoteFile(f"{server.url}/a.tgz")]), tmp_path / "set")
        write_tar(tars / "short.tar", [("k.txt", b"A."), ("k.jpg", JPG)])
        whole = (tars / "short.tar").read_bytes()
        (tars / "short.tar").write_bytes(whole[:1200])
        with pytest.raises(DataError, match="nothing to pack: no sample in 2 rows"):
            index(find_tars([RemoteFile(f"{server.url}/cc3m/short.tar")]), tmp_path / "set")
    assert "damaged tar" in (tmp_path / "set.rejected.jsonl").read_text()
    assert not (tmp_path / "set").exists()


def test_sources_on_the_command_line() -> None:
    assert parse_source("https://h/a=b.tar") == ("", RemoteFile("https://h/a=b.tar"))
    assert parse_source("cc=s3://b/c=d") == ("cc", RemoteFile("s3://b/c=d"))
