"""Rows behind a URL give the same samples as on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data.rows import Located
from llavamod_offline.data.sources.source import Source
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import DataError, StorageError
from llavamod_offline.storage.remote import RETRY_VARIABLE
from llavamod_offline.storage.remote_file import RemoteFile
from tests.llavamod_offline.data.sources.source_files import JPG, PNG, read_sources
from tests.web_server import WebServer, web_server


def row(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"<image>\n{number}?"}, {"role": "assistant", "content": "Yes."}]
    return {"id": f"r{number}", "messages": messages, "images": [{"bytes": (JPG, PNG)[number % 2], "path": "x"}]}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A data set laid out as on the Hub, and text files."""
    folder = tmp_path / "sets"
    (folder / "chart" / "data").mkdir(parents=True)
    for part in range(3):
        table = pa.Table.from_pylist([row(n) for n in range(40 * part, 40 * part + 40)])
        name = f"train-0000{part}-of-00003.parquet"
        pq.write_table(table, folder / "chart" / "data" / name, row_group_size=16)
    texts = [{"id": f"t{n}", "prompt": "a", "completion": "b"} for n in range(5)]
    (folder / "t.json").write_text(json.dumps(texts))
    (folder / "t.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    table = pa.Table.from_pylist(texts)
    with pa.OSFile(str(folder / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder


@pytest.fixture
def server(files: Path) -> Iterator[WebServer]:
    with web_server(files) as served:
        yield served


def samples(source: Source) -> list[Any]:
    found = list(read_sources([source]))
    assert all(isinstance(each, Located) for each in found)
    return [each.sample for each in found if isinstance(each, Located)]


@pytest.mark.parametrize("name", ["chart/data/train-00001-of-00003.parquet", "t.json", "t.jsonl", "t.arrow"])
def test_a_file_of_a_web_server(files: Path, server: WebServer, name: str) -> None:
    assert samples(Source(RemoteFile(f"{server.url}/{name}"))) == samples(Source(files / name))
    assert server.sent[name] <= 2 * (files / name).stat().st_size + 2**17  # not downloaded again for every batch


def test_a_query_is_no_part_of_the_name(files: Path, server: WebServer) -> None:
    found = samples(Source(RemoteFile(f"{server.url}/t.jsonl?download=true")))
    assert found == samples(Source(files / "t.jsonl"))


def test_a_folder_in_a_bucket(files: Path, bucket: str) -> None:
    """Tables at any depth; the first folder in their path is the source, as on disk."""
    storage = fsspec.filesystem("s3")
    storage.put(f"{files}/", f"{bucket}/sets", recursive=True)
    rule = ReadRule.of(None, ["json", "jsonl"])
    assert samples(Source(RemoteFile(f"{bucket}/sets"), rule=rule)) == samples(Source(files, rule=rule))
    with pytest.raises(DataError, match=r"sets': holds the table 'chart/data/.*' and also 't\.json'"):
        samples(Source(RemoteFile(f"{bucket}/sets")))
    origins = {each.file for each in read_sources([Source(RemoteFile(f"{bucket}/sets/chart"))])}
    assert f"{bucket}/sets/chart/data/train-00002-of-00003.parquet" in origins
    with pytest.raises(DataError, match=r"holds no \.parquet or \.arrow, or cannot be listed: name its files"):
        list(read_sources([Source(RemoteFile(f"{bucket}/sets/none"))]))


def test_what_is_not_there(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RETRY_VARIABLE, "0")
    for name, error, problem in (
        ("none.parquet", StorageError, "no such file, or its server does not answer: check the address"),
        ("x.tar", DataError, r"its name must end in one of \.json"),
    ):
        with pytest.raises(error, match=problem) as caught:
            list(read_sources([Source(RemoteFile(f"{server.url}/{name}"))]))
        assert "\n" not in str(caught.value)
