"""Reading packed sets: by position, from any thread or process, and never a damaged sample."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import tarfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets import sample_set as shards
from llavamod_offline.data.sets import tar_files as tars
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError
from tests.tiny import tiny_samples, write_tiny_set

N = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("sets") / "tiny", N, shard_samples=5)


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    return write_tiny_set(tmp_path / "tiny", N, shard_samples=5)


@pytest.mark.parametrize("preference", [False, True])
def test_reads_what_was_packed(tmp_path: Path, preference: bool) -> None:
    path = write_tiny_set(tmp_path / "tiny", N, preference=preference, shard_samples=4)
    samples, packed = tiny_samples(N, preference=preference), SampleSet.open(path)
    assert len(packed) == N
    assert [packed.read(row, verify=True) for row in range(N)] == samples
    assert packed.keys == [sample.key for sample in samples]
    assert [packed.row_of(key) for key in packed.keys] == list(range(N))
    assert packed.path == path


def test_shards_and_their_rows(folder: Path) -> None:
    packed = SampleSet.open(folder)
    assert packed.shard_names == [f"tiny-{number:06d}" for number in range(5)]
    assert [packed.rows_of(name) for name in packed.shard_names] == [
        range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)
    ]  # fmt: skip
    for ordinal, name in enumerate(packed.shard_names):
        rows = packed.rows_of(name)
        assert set(packed.index.column("shard").to_pylist()[rows.start : rows.stop]) == {ordinal}
        with tarfile.open(folder / f"{name}.tar") as tar:
            in_tar = {member.split(".")[0] for member in tar.getnames()}
        assert in_tar == {packed.keys[row] for row in rows}
    with pytest.raises(DataError, match="has no shard 'tiny-000005'"):
        packed.rows_of("tiny-000005")


def test_index_columns(folder: Path) -> None:
    index = SampleSet.open(folder).index
    for sample, entry in zip(tiny_samples(N), index.to_pylist(), strict=True):
        assert entry["content_hash"] == sample.content_hash
        assert entry["kind"] == "conversation"
        assert (entry["n_turns"], entry["n_images"]) == (len(sample.turns), len(sample.images))
        assert entry["text_length"] == sum(len(turn.text) for turn in sample.turns)
        assert entry["source"] == "tiny"


def test_offsets_are_those_of_the_tar(folder: Path) -> None:
    packed = SampleSet.open(folder)
    found = {
        (name, f"{entry['key']}.{member['name']}"): (member["offset"], member["size"])
        for name in packed.shard_names
        for entry in packed.index.slice(packed.rows_of(name).start, len(packed.rows_of(name))).to_pylist()
        for member in entry["members"]
    }
    expected: dict[tuple[str, str], tuple[int, int]] = {}
    for name in packed.shard_names:
        with tarfile.open(folder / f"{name}.tar") as tar:
            expected |= {(name, member.name): (member.offset_data, member.size) for member in tar}
    assert found == expected


def test_webdataset_reads_the_tars(folder: Path) -> None:
    """The shards are plain WebDataset: its reader groups the same samples."""
    packed = SampleSet.open(folder)
    read = []
    for name in packed.shard_names:
        with (folder / f"{name}.tar").open("rb") as stream:
            read += list(group_by_keys(tar_file_expander([{"url": name, "stream": stream}])))
    assert [entry["__key__"] for entry in read] == packed.keys
    for sample, entry in zip(tiny_samples(N), read, strict=True):
        names = ["png"] if len(sample.images) == 1 else [f"{number}.png" for number in range(len(sample.images))]
        assert tuple(entry[name] for name in names) == sample.images
        assert json.loads(entry["json"])["content_hash"] == sample.content_hash


def test_long_keys(tmp_path: Path) -> None:
    """Longer than the 100 characters of a plain tar header."""
    samples = [Sample(f"{number}-{'k' * 198}", sample.turns) for number, sample in enumerate(tiny_samples(8)[3::4])]
    write_set(samples, tmp_path / "long")
    packed = SampleSet.open(tmp_path / "long")
    assert [packed.read(row, verify=True) for row in range(len(packed))] == samples


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_from_worker_processes(folder: Path, method: str) -> None:
    packed = SampleSet.open(folder)
    packed.read(0)  # its shard is open before the processes start
    rows = list(range(N)) * 2
    random.Random(0).shuffle(rows)
    with multiprocessing.get_context(method).Pool(2) as pool:
        samples = pool.starmap(SampleSet.read, [(packed, row) for row in rows], chunksize=5)
    assert [sample.key for sample in samples] == [packed.keys[row] for row in rows]


def test_forked_processes_share_descriptors_without_harm(folder: Path) -> None:
    packed = SampleSet.open(folder)
    rows = list(range(N)) * 20
    random.Random(1).shuffle(rows)
    packed.read(0)
    child = os.fork()
    keys = [packed.read(row, verify=True).key for row in rows]
    if child == 0:
        os._exit(0 if keys == [packed.keys[row] for row in rows] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert keys == [packed.keys[row] for row in rows]


def test_threads_and_few_open_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few shards stay open, and closing one never affects a thread that is reading from it."""
    monkeypatch.setattr(tars, "_MAX_OPEN", 2)
    packed = SampleSet.open(write_tiny_set(tmp_path / "tiny", N, shard_samples=1))
    before = len(os.listdir("/proc/self/fd"))
    rows = list(range(N)) * 40
    random.Random(2).shuffle(rows)
    with ThreadPoolExecutor(4) as threads:
        keys = list(threads.map(lambda row: packed.read(row, verify=True).key, rows))
    assert keys == [packed.keys[row] for row in rows]
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 3  # each of the other threads may have one more open


def test_pickle_holds_the_path_alone(folder: Path) -> None:
    packed = SampleSet.open(folder)
    packed.read(3)
    content = pickle.dumps(packed)
    assert len(content) < 500
    assert pickle.loads(content).read(7) == packed.read(7)


def test_opening_touches_no_tar(own_folder: Path) -> None:
    for tar in own_folder.glob("*.tar"):
        tar.unlink()
    packed = SampleSet.open(own_folder)
    assert len(packed) == N
    with pytest.raises(DataError, match=r"shard 'tiny-000001': No such file or directory"):
        packed.read(5)


def test_rows_and_keys_that_are_not_there(folder: Path) -> None:
    packed = SampleSet.open(folder)
    for row in (-1, N):
        with pytest.raises(DataError, match=f"has no row {row}: it holds {N} samples"):
            packed.read(row)
    with pytest.raises(DataError, match="has no sample 'nobody'"):
        packed.row_of("nobody")


def test_a_shard_cut_short(own_folder: Path) -> None:
    tar = own_folder / "tiny-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    packed = SampleSet.open(own_folder)
    packed.read(0)
    with pytest.raises(DataError, match=r"shard 'tiny-000001': \d+ bytes instead of \d+: pack the set again"):
        packed.read(5)


def _overwrite(packed: SampleSet, row: int, member: int, content: bytes) -> None:
    entry = packed.index.slice(row, 1).to_pylist()[0]
    name = packed.shard_names[entry["shard"]]
    with (Path(packed.path) / f"{name}.tar").open("r+b") as stream:
        stream.seek(entry["members"][member]["offset"])
        stream.write(content)


def test_changed_bytes(own_folder: Path) -> None:
    packed = SampleSet.open(own_folder)
    _overwrite(packed, 0, 1, b"XXXX")
    packed.read(0)
    where = r"shard 'tiny-000000', sample 'tiny-0000'"
    with pytest.raises(DataError, match=f"{where}: its content differs from what was packed"):
        packed.read(0, verify=True)
    _overwrite(packed, 0, 0, b"XXXX")
    with pytest.raises(DataError, match=f"{where}: .*JSON cannot be read"):
        packed.read(0)


def test_members_beyond_the_tar(own_folder: Path) -> None:
    table = SampleSet.open(own_folder).index
    rows = table.to_pylist()
    rows[0]["members"][0]["size"] = 2**20
    with pa.ipc.new_file(str(own_folder / "index.arrow"), shards.INDEX_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=shards.INDEX_SCHEMA))
    with pytest.raises(DataError, match=r"sample 'tiny-0000', member 'json': the tar holds \d+ of its 1048576 bytes"):
        SampleSet.open(own_folder).read(0)


def test_folders_that_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder: make a set with `llavamod-offline pack`"):
        SampleSet.open(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no set\.json"):
        SampleSet.open(tmp_path)


def test_an_index_that_was_not_uploaded_is_named(own_folder: Path) -> None:
    """Rather than the local folder in which it would be kept."""
    url = f"memory://{uuid.uuid4().hex}/set"
    content = (own_folder / "set.json").read_bytes()
    fsspec.filesystem("memory").pipe_file(f"{url}/set.json", content)
    with pytest.raises(DataError, match=r"no index\.arrow: upload or pack it again"):
        SampleSet.open(url)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("set.json", b"{", r"set\.json cannot be read"),
        ("set.json", b"[]", r"set\.json cannot be read"),
        ("set.json", b'{"format": 2}', r"set\.json cannot be read"),
        ("set.json", b'{"format": 3, "shards": []}', "format 3, this version reads 2"),
        ("set.json", b'{"format": 2, "shards": []}', r"index\.arrow does not match set\.json"),
        ("index.arrow", b"", r"index\.arrow cannot be read"),
        ("index.arrow", b"no arrow" * 10, r"index\.arrow cannot be read"),
    ],
)
def test_damaged_manifest_or_index(own_folder: Path, file: str, content: bytes, problem: str) -> None:
    (own_folder / file).write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        SampleSet.open(own_folder)
    assert f"set '{own_folder}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_index_and_other_columns(own_folder: Path) -> None:
    index = own_folder / "index.arrow"
    table = pa.table({"key": ["a"]})
    with pa.ipc.new_file(str(index), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"index\.arrow has other columns"):
        SampleSet.open(own_folder)
    index.unlink()
    with pytest.raises(DataError, match=r"index\.arrow cannot be read"):
        SampleSet.open(own_folder)


def test_an_empty_set(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text('{"format": 2, "shards": []}')
    with pa.ipc.new_file(str(tmp_path / "index.arrow"), shards.INDEX_SCHEMA):
        pass
    with pytest.raises(DataError, match=r"holds no samples: see rejected\.jsonl"):
        SampleSet.open(tmp_path)


def test_where_samples_come_from(tmp_path: Path) -> None:
    samples = tiny_samples(3)
    rows = [Located(samples[0], "b.json", 7), Located(samples[1], "a.json", 0), Located(samples[2], "b.json", 9)]
    write_set(rows, tmp_path / "set")
    packed = SampleSet.open(tmp_path / "set")
    assert [packed.origin(sample.key) for sample in samples] == [("b.json", 7), ("a.json", 0), ("b.json", 9)]
    with pytest.raises(DataError, match="has no sample 'none'"):
        packed.origin("none")
    write_set([replace(samples[0], key="coco_x2Fa_x2Ejpg")], tmp_path / "escaped")
    escaped = SampleSet.open(tmp_path / "escaped")
    assert escaped.row_of("coco/a.jpg") == escaped.row_of("coco_x2Fa_x2Ejpg") == 0


def test_sets_of_earlier_versions(own_folder: Path) -> None:
    """The index of such sets does not say where samples come from."""
    table = SampleSet.open(own_folder).index.drop(["file", "row"])
    with pa.ipc.new_file(str(own_folder / "earlier"), table.schema) as writer:
        writer.write_table(table)
    (own_folder / "earlier").replace(own_folder / "index.arrow")
    packed = SampleSet.open(own_folder)
    assert packed.read(0, verify=True).key == packed.keys[0]
    assert packed.origin(packed.keys[0]) is None
