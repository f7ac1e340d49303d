"""Sources: files and folders of any format, one after another, by one process or several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located, RejectedRow
from llavamod_offline.data.sample import Sample, sample_to_json
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources import image_folders
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.data.sources.source import Source
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.sources.source_files import (
    GOOD,
    JPG,
    PNG,
    TEXT,
    only_rejection,
    read_sources,
    samples,
    turns,
    write_images,
    write_parquet,
    write_rows,
)
from tests.tiny import tiny_image, tiny_samples


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def test_bad_lines_do_not_stop_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    good = json.dumps({"id": "a", "conversations": TEXT})
    file.write_text(f"{{bad\n{good}\n")
    bad, row = read_sources([file])
    assert isinstance(bad, RejectedRow)
    assert (bad.key, bad.kind, bad.row) == ("chat-000000000", "malformed row", 0)
    assert isinstance(row, Located)
    assert row.row == 1


def test_several_files_and_folders(tmp_path: Path, images: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "d.png").write_bytes(tiny_image(9))
    (other / "b.png").write_bytes(tiny_image(8))
    first = write_rows(tmp_path / "one.json", [{"id": 1, "image": "d.png", "conversations": GOOD}])
    second = write_rows(tmp_path / "two.jsonl", [{"id": 2, "image": "coco/a.jpg", "conversations": GOOD}])
    found = samples(read_sources([first, second], images=[images, other]))
    assert [(sample.key, sample.images[0], sample.source) for sample in found] == [
        ("1", tiny_image(9), "one"),
        ("2", JPG, "two"),
    ]
    both = {"id": "k", "image": "b.png", "conversations": GOOD}
    rejection = only_rejection(tmp_path, both, [images, other])
    assert rejection.kind == "bad image path"
    assert "in more than one image folder" in rejection.reason


def test_links_in_image_folders_are_followed(tmp_path: Path, images: Path) -> None:
    (images / "vg").symlink_to(tmp_path)
    file = write_rows(tmp_path / "a.json", [{"id": 1, "image": "vg/outside.png", "conversations": GOOD}])
    assert samples(read_sources([file], images=[images]))[0].images == (PNG,)


def test_large_files_are_not_read(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folders, "MAX_ENCODED_BYTES", 10)
    rejection = only_rejection(tmp_path, {"id": "k", "image": "b.png", "conversations": GOOD}, [images])
    assert rejection.kind == "undecodable image"
    assert "bytes, more than 10" in rejection.reason


def test_images_without_a_folder_are_an_error_of_the_call(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.json", [{"id": 1, "image": "b.png", "conversations": GOOD}])
    with pytest.raises(DataError, match=r"image 'b\.png': no image folder: name one with --images DIR"):
        list(read_sources([file]))


def test_keys_by_row(tmp_path: Path) -> None:
    rows = [{"id": "same", "conversations": TEXT}] * 2
    file = write_rows(tmp_path / "my set.json", rows)
    found = samples(read_sources([file], keys="row"))
    assert [sample.key for sample in found] == ["my_x20set-000000000", "my_x20set-000000001"]


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.json", [])
    (tmp_path / "b.csv").write_text("a,b")
    (tmp_path / "sub").mkdir()
    same = write_rows(tmp_path / "sub" / "a.json", [])
    cases: list[tuple[list[Path], str]] = [
        ([tmp_path / "none.json"], "no such file"),
        ([tmp_path / "b.csv"], r"its name must end in one of \.json, \.jsonl, \.parquet"),
        ([file, tmp_path / "sub" / ".." / "a.json"], "is given twice"),
    ]
    for files, problem in cases:
        with pytest.raises(DataError, match=problem):
            read_sources(files)
    with pytest.raises(DataError, match=r"image folder '.*none': no such folder"):
        read_sources([file], images=[tmp_path / "none"])
    read_sources([file, same])
    with pytest.raises(DataError, match="yield the same row keys: rename one of them"):
        read_sources([file, same], keys="row")


def test_named_sources_with_folders_of_their_own(tmp_path: Path, images: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.png").write_bytes(tiny_image(8))
    row = {"image": "b.png", "conversations": GOOD}
    first, second = (write_rows(tmp_path / f"{name}.json", [row | {"id": name}]) for name in ("one", "two"))
    pairs = write_parquet(tmp_path / "pairs.parquet", [{}])
    found = samples(
        read_sources([Source(first, "mine", (images,)), Source(second, images=(other,)), Source(pairs, "p")])
    )
    assert [(sample.source, sample.images[0]) for sample in found] == [
        ("mine", PNG),
        ("two", tiny_image(8)),
        ("p", JPG),
    ]


def test_tars_belong_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    for place in (tmp_path, tmp_path / "a.tar"):
        with pytest.raises(DataError, match="index tars in place with `llavamod-offline index`"):
            read_sources([place])


def test_prepared_rows_are_the_same_from_any_number_of_processes(tmp_path: Path, images: Path) -> None:
    """Every format, with rejections and a file that ends in an error; the output is identical to the byte."""
    rows: list[Any] = [
        {"id": n, "image": ["coco/a.jpg", "cut.jpg", "b.png"][n % 3], "conversations": GOOD} for n in range(50)
    ]
    files = [
        write_rows(tmp_path / "a.json", rows),
        write_parquet(tmp_path / "p.parquet", [{"idx": 100 + n} for n in range(40)]),
    ]
    written = {}
    for workers in (1, 2, 3):
        prepared = prepare_sources(files, images=[images], max_side=20, workers=workers)
        write_set(prepared, tmp_path / "set", shard_samples=30, max_side=20, overwrite=True)
        written[workers] = {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()}
    assert len(written[1]) == 6
    assert written[1] == written[2] == written[3]
    packed = SampleSet.open(tmp_path / "set")
    direct = [row.sample for row in read_sources(files, images=[images]) if isinstance(row, Located)]
    assert packed.keys == [sample.key for sample in direct]
    assert [packed.read(row, verify=True).turns for row in range(len(packed))] == [sample.turns for sample in direct]
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:-9])
    for workers in (1, 2):
        found: list[Any] = []
        with pytest.raises(DataError, match=r"a\.json: row 49"):
            found.extend(prepare_sources(files, images=[images], workers=workers))
        assert len(found) == 49


def test_folders_of_samples(tmp_path: Path) -> None:
    """The contents of a tar, unpacked: texts and captions beside images, at any depth, this project's own files too."""
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    own = tiny_samples(1)[0]
    files = {
        "b.json": json.dumps({"conversations": GOOD}).encode(),
        "b.JPG": JPG,
        "sub/a.txt": b"\xef\xbb\xbf A dog. ",  # with the byte order mark that Windows editors write
        "sub/a.png": PNG,
        "sub/lost.png": PNG,
        "a_x2F.json": sample_to_json(own),
        "a_x2F.png": own.images[0],
        "c.json": json.dumps({"conversations": TEXT}).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "c.txt").symlink_to(folder / "nowhere")
    rule = ReadRule(caption_prompt="Describe it.")
    found = list(read_sources([Source(folder, rule=rule)]))
    assert [row.sample if isinstance(row, Located) else row.key for row in found] == [
        replace(own, key="a_x2F"),
        Sample("b", turns("<image>\nWhat?", "That."), (JPG,), ("jpg",), source="mine"),
        "c",
        Sample("sub_x2Fa", turns("<image>\nDescribe it.", "A dog."), (PNG,), ("png",), source="mine"),
        "sub_x2Flost",
    ]
    rejections = [row for row in found if isinstance(row, RejectedRow)]
    assert f"file 'c.txt': a link to '{folder / 'nowhere'}', which does not exist" in rejections[0].reason
    assert "has no text" in rejections[1].reason
    by_row = [row for row in read_sources([Source(folder, "n", rule=rule)], keys="row") if isinstance(row, Located)]
    assert [row.sample.key for row in by_row] == [f"mine-{number:09d}" for number in (0, 1, 3)]
    assert {row.sample.source for row in by_row} == {"n"}
