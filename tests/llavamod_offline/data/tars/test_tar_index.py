"""Other tools' tars, indexed in place: the right samples, read back unchanged, with the tars untouched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import fsspec
import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.tars.tar_index import TarSource, find_tars, index_tars
from llavamod_offline.errors import DataError
from llavamod_offline.grace import Grace
from llavamod_offline.signals import Stopped, interruptible
from tests.llavamod_offline.data.tars.foreign_tars import row, said, talk, write_tar
from tests.tiny import tiny_image, tiny_samples, write_tiny_set

JPG, PNG, WEBP = tiny_image(0, format="JPEG"), tiny_image(1), tiny_image(2, format="WEBP")


def read_all(folder: Path) -> list[Sample]:
    packed = SampleSet.open(folder)
    return [packed.read(number, verify=True) for number in range(len(packed))]


def rejected(folder: Path) -> dict[str, tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return {row["key"]: (row["kind"], row["reason"]) for row in rows}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(
        tmp_path / "mine" / "a.tar",
        [
            ("./000.json", row("<image>\nWhat?", "That.", image="coco/a.jpg", id=7)),
            ("./000.jpg", JPG),
            ("001.JPEG", JPG),
            ("001.json", row("What?\n<image>", "That.")),
            ("sub/002.1.webp", WEBP),
            ("sub/002.0.png", PNG),
            ("sub/002.json", row("<image> or <image>?", "Both.")),
            ("003.json", row("Is it?", "Yes.", "Sure?", "Quite.")),
            ("004.json", json.dumps({"chosen": talk("<image>?", "A."), "rejected": talk("<image>?", "B.")}).encode()),
            ("004.png", PNG),
        ],
    )


EXPECTED = [
    said("000", "<image>\nWhat?", "That.", images=(JPG,), kinds=("jpg",), source="mine"),
    said("001", "What?\n<image>", "That.", images=(JPG,), kinds=("jpg",), source="mine"),
    said("sub_x2F002", "<image> or <image>?", "Both.", images=(PNG, WEBP), kinds=("png", "webp"), source="mine"),
    said("003", "Is it?", "Yes.", "Sure?", "Quite.", source="mine"),
    Sample("004", (Turn("user", "<image>?"),), (PNG,), ("png",), "A.", "B.", "mine"),
]


def test_llava_tars(tmp_path: Path, tar: Path) -> None:
    before = tar.read_bytes()
    summary = index_tars([TarSource(tar)], tmp_path / "set")
    assert read_all(tmp_path / "set") == EXPECTED
    assert (summary.samples, summary.conversations, summary.preferences, summary.images) == (5, 4, 1, 5)
    assert (summary.rejected, summary.sources, summary.shards, summary.bytes) == (0, {"mine": 5}, 1, len(before))
    assert tar.read_bytes() == before
    manifest = json.loads((tmp_path / "set" / "set.json").read_text())
    sha256 = hashlib.sha256(before).hexdigest()
    expected = {"name": "a", "samples": 5, "bytes": len(before), "sha256": sha256, "path": "../mine/a.tar"}
    assert manifest["shards"] == [expected]


def test_the_index_says_what_a_packed_set_says(tmp_path: Path, tar: Path) -> None:
    """The same samples, packed, have the same digest, and the same columns except for their location."""
    index_tars([TarSource(tar)], tmp_path / "set")
    write_set(EXPECTED, tmp_path / "packed")
    indexed, packed = SampleSet.open(tmp_path / "set"), SampleSet.open(tmp_path / "packed")
    assert indexed.digest == packed.digest
    others = ["members", "parser", "file", "row"]
    assert indexed.index.drop(others).to_pylist() == packed.index.drop(others).to_pylist()
    assert [indexed.origin(key) for key in indexed.keys] == [(str(tar), number) for number in (0, 2, 4, 7, 8)]
    assert set(indexed.index.column("parser").to_pylist()) == {"llava"}
    for entry in indexed.index.to_pylist():
        for member in entry["members"]:
            content = tar.read_bytes()[member["offset"] : member["offset"] + member["size"]]
            assert content in {JPG, PNG, WEBP} or b"from" in content


def test_offsets_of_every_tar_format(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        key = "k" * (90 if form == tarfile.USTAR_FORMAT else 190)
        tar = write_tar(
            tmp_path / f"{form}.tar", [(f"{key}.json", row("<image>?", "That.")), (f"{key}.png", PNG)], form
        )
        index_tars([TarSource(tar, "s")], tmp_path / f"set-{form}")
        expected = said(key, "<image>?", "That.", images=(PNG,), kinds=("png",), source="s")
        assert read_all(tmp_path / f"set-{form}") == [expected]


def test_own_tars(tmp_path: Path) -> None:
    """A packed set's tars without its index, including samples with escaped keys."""
    samples = [*tiny_samples(7), *tiny_samples(3, preference=True), said("a_x2Fb", "Is it?", "Yes.", source="x")]
    write_set(samples, tmp_path / "packed", shard_samples=4)
    index_tars(find_tars([tmp_path / "packed"]), tmp_path / "set")
    assert read_all(tmp_path / "set") == samples
    assert SampleSet.open(tmp_path / "set").digest == SampleSet.open(tmp_path / "packed").digest
    index_tars(find_tars([tmp_path / "packed"], "other"), tmp_path / "named")
    assert {sample.source for sample in read_all(tmp_path / "named")} == {"other"}


def test_captions(tmp_path: Path) -> None:
    metadata = json.dumps({"url": "http://x", "caption": "A dog."}).encode()
    entries = [("0.jpg", JPG), ("0.txt", b" A dog.\n"), ("0.json", metadata), ("1.png", PNG), ("1.txt", "Ä".encode())]
    tar = write_tar(tmp_path / "cc" / "a.tar", entries)
    with pytest.raises(DataError, match="a caption without a prompt: set one with --caption-prompt"):
        index_tars([TarSource(tar)], tmp_path / "set")
    index_tars([TarSource(tar)], tmp_path / "set", caption_prompt="Describe it.")
    assert read_all(tmp_path / "set") == [
        said("0", "<image>\nDescribe it.", "A dog.", images=(JPG,), kinds=("jpg",), source="cc"),
        said("1", "<image>\nDescribe it.", "Ä", images=(PNG,), kinds=("png",), source="cc"),
    ]
    index_tars([TarSource(tar)], tmp_path / "after", caption_prompt="What is in <image>?")
    assert read_all(tmp_path / "after")[0].turns[0].text == "What is in <image>?"


def test_where_tars_are_found_again(tmp_path: Path) -> None:
    """Tars below the set's parent folder may move with it; others must stay where they were."""
    near, far = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (near / "tars", far):
        write_tar(folder / f"{folder.name}.tar", [(f"{folder.name}.json", row("Is it?", "Yes."))])
    index_tars(find_tars([near / "tars", far]), near / "set")
    shards = SampleSet.open(near / "set").shards
    assert [shard.path for shard in shards] == ["../tars/tars.tar", str(far / "elsewhere.tar")]
    near.rename(tmp_path / "moved")
    assert [sample.key for sample in read_all(tmp_path / "moved" / "set")] == ["tars", "elsewhere"]
    shutil.rmtree(far)
    with pytest.raises(DataError, match="shard 'elsewhere': No such file or directory: index the tars again"):
        read_all(tmp_path / "moved" / "set")


def test_a_tar_that_changed_is_noticed(tmp_path: Path, tar: Path) -> None:
    index_tars([TarSource(tar)], tmp_path / "set")
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"Quite", b"Maybe"))
    packed = SampleSet.open(tmp_path / "set")
    with pytest.raises(DataError, match="sample '003': its content differs from what was packed: index the tars again"):
        packed.read(packed.row_of("003"), verify=True)
    tar.write_bytes(content + bytes(512))
    with pytest.raises(DataError, match=r"shard 'a': \d+ bytes instead of \d+: index the tars again"):
        read_all(tmp_path / "set")


def test_names_of_shards_and_keys(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_tar(tmp_path / folder / "0.tar", [("000.json", row("Is it?", "Yes."))])
        write_tar(tmp_path / folder / "1.tar", [(f"{folder}.json", row("Is it?", "Yes."))])
    tars = find_tars([tmp_path])
    with pytest.raises(
        DataError, match=r"duplicate key '000': .*one/0.tar row 0 and .*two/0.tar row 0: .*--keys shard"
    ):
        index_tars(tars, tmp_path / "set")
    index_tars(tars, tmp_path / "set", keys="shard")
    packed = SampleSet.open(tmp_path / "set")
    assert packed.shard_names == ["one_x2F0", "one_x2F1", "two_x2F0", "two_x2F1"]
    assert packed.keys == ["one_x2F0-000", "one_x2F1-one", "two_x2F0-000", "two_x2F1-two"]
    assert [sample.source for sample in read_all(tmp_path / "set")] == ["one", "one", "two", "two"]


def test_tars_that_cannot_be_had(tmp_path: Path, tar: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "empty"], r"no \.tar in this folder"),
        ([tmp_path / "none.tar"], "no such file"),
        ([tar, tar.parent], "is given twice"),
    ]
    for places, problem in cases:
        with pytest.raises(DataError, match=problem):
            index_tars(find_tars(places), tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_an_index_does_not_replace_the_tars_it_points_to(tmp_path: Path) -> None:
    """Such as that of a packed set in its own folder: the old set is removed once the new one is there."""
    folder = write_tiny_set(tmp_path / "set", 4, shard_samples=2)
    for output in (folder, tmp_path):
        with pytest.raises(DataError, match=r"set-000000\.tar': lies in the output, which would replace it"):
            index_tars(find_tars([folder]), output, overwrite=True)
    assert len(read_all(folder)) == 4


def test_a_name_that_is_not_utf_8_is_one_line(tmp_path: Path, tar: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.tar")
    shutil.copy(tar, odd)
    with pytest.raises(DataError, match=r"caf\\udce9\.tar': its name is not UTF-8: rename it"):
        index_tars(find_tars([odd]), tmp_path / "set")
    with pytest.raises(DataError, match=r"caf\\udce9': its name is not UTF-8: choose another"):
        index_tars(find_tars([tar]), tmp_path / os.fsdecode(b"caf\xe9"))


def test_ignored_members(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("0.json", row("Is it?", "Yes.")), ("0.npy", b"3")])
    with pytest.raises(DataError, match=r"unsupported member '\.npy': skip it with --ignore npy"):
        index_tars([TarSource(tar)], tmp_path / "set")
    index_tars([TarSource(tar)], tmp_path / "set", ignore=[".NPY"])
    assert len(SampleSet.open(tmp_path / "set")) == 1


def test_the_same_from_several_processes(tmp_path: Path) -> None:
    path = write_tiny_set(tmp_path / "packed", 40, shard_samples=6)
    (path / "packed-000001.tar").write_bytes(b"broken")
    found = {}
    for workers in (1, 3):
        index_tars(find_tars([path]), tmp_path / "set", workers=workers, overwrite=True)
        found[workers] = {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    assert found[1] == found[3]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seconds", [600.0, 1e-6, 0.0])
def test_sigterm_finishes_the_whole_set_or_leaves_nothing(tmp_path: Path, seconds: float, workers: int) -> None:
    """A partial index cannot be kept: given time for all tars, the set is finished as if undisturbed."""
    tars = find_tars([write_tiny_set(tmp_path / "packed", 12, shard_samples=3)])
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    index_tars(tars, tmp_path / "undisturbed" / "set")
    read: list[int] = []

    def stop_after_the_second(size: int) -> None:
        read.append(size)
        if len(read) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def index() -> None:
        with Grace(seconds) as grace:
            index_tars(tars, tmp_path / "stopped" / "set", workers=workers, advance=stop_after_the_second, grace=grace)

    with interruptible():
        if seconds == 600.0:
            index()
        else:
            with pytest.raises(Stopped) as stopped:
                index()
            assert stopped.value.status == 143
    left = [path.name for path in (tmp_path / "stopped").iterdir()]
    assert left == (["set"] if seconds == 600.0 else [])
    for name in left:
        files = [
            {file.name: file.read_bytes() for file in (tmp_path / place / name).iterdir()}
            for place in ("stopped", "undisturbed")
        ]
        assert files[0] == files[1]


def test_weights(tmp_path: Path, tar: Path) -> None:
    index_tars([TarSource(tar)], tmp_path / "set", weights={"mine": 0.5})
    assert SampleSet.open(tmp_path / "set").manifest["weights"] == {"mine": 0.5}


def test_behind_a_url(tmp_path: Path, tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set and its tars, uploaded next to each other."""
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))
    index_tars([TarSource(tar)], tmp_path / "set")
    store = fsspec.filesystem("memory")
    for file in (tar, *(tmp_path / "set").iterdir()):
        store.pipe_file(f"/bucket/{file.parent.name}/{file.name}", file.read_bytes())
    packed = SampleSet.open("memory://bucket/set")
    assert [packed.read(number, verify=True) for number in range(len(packed))] == EXPECTED
