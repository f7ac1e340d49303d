"""Sources: each format's rows as samples, and each way a row can be wrong as a rejection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data import image_folders
from llavamod_offline.data.pack import write_set
from llavamod_offline.data.rows import Located, Rejection
from llavamod_offline.data.sample import Sample, Turn, sample_to_json
from llavamod_offline.data.shards import SampleSet
from llavamod_offline.data.sources import Source, prepare_sources, read_sources
from llavamod_offline.data.tar_samples import ReadRule
from llavamod_offline.errors import DataError
from tests.tiny import tiny_image, tiny_samples

JPG, PNG, WEBP = tiny_image(0, format="JPEG"), tiny_image(1), tiny_image(2, format="WEBP")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    (folder / "coco" / "a.jpg").write_bytes(JPG)
    (folder / "b.png").write_bytes(PNG)
    (folder / "c.webp").write_bytes(WEBP)
    (folder / "wrong.png").write_bytes(JPG)
    (folder / "cut.jpg").write_bytes(JPG[: len(JPG) // 2])
    (folder / "text.jpg").write_bytes(b"hello")
    (tmp_path / "outside.png").write_bytes(PNG)
    return folder


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))


def write_rows(file: Path, rows: list[Any]) -> Path:
    separator, (opening, closing) = ("\n", ("", "")) if file.suffix == ".jsonl" else (",\n", ("[", "]"))
    file.write_text(opening + separator.join(json.dumps(row) for row in rows) + closing)
    return file


def samples(rows: Iterator[Located | Rejection]) -> list[Sample]:
    found = list(rows)
    assert not [row for row in found if isinstance(row, Rejection)]
    return [row.sample for row in found if isinstance(row, Located)]


def only_rejection(tmp_path: Path, row: Any, folders: list[Path]) -> Rejection:
    """The rejection of a row that stands between two good ones."""
    good = [{"id": name, "conversations": talk("Is it?", "Yes.")} for name in ("first", "last")]
    file = write_rows(tmp_path / "rows.json", [good[0], row, good[1]])
    first, middle, last = read_sources([file], images=folders)
    assert isinstance(first, Located)
    assert isinstance(last, Located)
    assert (first.sample.key, last.sample.key) == ("first", "last")
    assert isinstance(middle, Rejection)
    assert (middle.file, middle.row) == (str(file), 1)
    return middle


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_rows(tmp_path: Path, images: Path, suffix: str) -> None:
    rows = [
        {"id": "one", "image": "coco/a.jpg", "conversations": talk("<image>\nWhat?", "That.")},
        {"id": "end", "image": ["b.png"], "conversations": talk("What?\n<image>", "That.")},
        {"id": 3, "conversations": talk("Is it?", "Yes.", "Sure?", "Quite.")},
        {"id": "many", "image": ["c.webp", "coco/a.jpg"], "conversations": talk("<image> or <image>?", "Both.")},
        {"id": "later", "image": "b.png", "conversations": talk("Hello.", "Yes?", "And <image>?", "A dog.")},
        {"id": "null", "image": None, "conversations": talk("Is it?", "Yes.")},
        {"image": [], "conversations": talk("Is it?", "Yes.")},
        {"id": "content", "image": "wrong.png", "model": "x", "conversations": talk("<image>", "A photograph.")},
    ]
    file = write_rows(tmp_path / f"chat{suffix}", rows)
    assert samples(read_sources([file], images=[images])) == [
        Sample("one", turns("<image>\nWhat?", "That."), (JPG,), ("jpg",), source="chat"),
        Sample("end", turns("What?\n<image>", "That."), (PNG,), ("png",), source="chat"),
        Sample("3", turns("Is it?", "Yes.", "Sure?", "Quite."), source="chat"),
        Sample("many", turns("<image> or <image>?", "Both."), (WEBP, JPG), ("webp", "jpg"), source="chat"),
        Sample("later", turns("Hello.", "Yes?", "And <image>?", "A dog."), (PNG,), ("png",), source="chat"),
        Sample("null", turns("Is it?", "Yes."), source="chat"),
        Sample("chat-000000006", turns("Is it?", "Yes."), source="chat"),
        Sample("content", turns("<image>", "A photograph."), (JPG,), ("jpg",), source="chat"),
    ]


def test_preference_rows(tmp_path: Path, images: Path) -> None:
    """LLaVA-MoD's preference JSON: both answers with their prompt, of one or several turns."""
    rows = [
        {
            "id": "p",
            "image": "b.png",
            "chosen": talk("<image>\nWhat?", "A dog."),
            "rejected": talk("<image>\nWhat?", "A cat."),
        },
        {"id": "q", "chosen": talk("Hi.", "Yes?", "Why?", "So."), "rejected": talk("Hi.", "Yes?", "Why?", "No.")},
    ]
    file = write_rows(tmp_path / "pairs.json", rows)
    assert samples(read_sources([file], images=[images])) == [
        Sample("p", turns("<image>\nWhat?"), (PNG,), ("png",), "A dog.", "A cat.", "pairs"),
        Sample("q", turns("Hi.", "Yes?", "Why?"), (), (), "So.", "No.", "pairs"),
    ]


GOOD = talk("<image>\nWhat?", "That.")
TEXT = talk("Is it?", "Yes.")


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (17, "malformed row", "expected an object, found int"),
        ({"id": "k"}, "malformed row", "expected either 'conversations'"),
        ({"id": "k", "conversations": TEXT, "chosen": TEXT}, "malformed row", "expected either 'conversations'"),
        ({"id": "k", "conversations": []}, "malformed row", "must be a list of turns, at least one"),
        ({"id": "k", "conversations": "hi"}, "malformed row", "must be a list of turns"),
        ({"id": "k", "conversations": ["hi"]}, "malformed row", "turn 0: expected an object of strings"),
        ({"id": "k", "conversations": [{"from": "human"}]}, "malformed row", "turn 0: expected an object of strings"),
        ({"id": "k", "conversations": [{"from": "human", "value": 3}]}, "malformed row", "turn 0: expected an object"),
        ({"id": "k", "image": 3, "conversations": GOOD}, "malformed row", "'image' must be a path or a list"),
        ({"id": "k", "image": [3], "conversations": GOOD}, "malformed row", "'image' must be a path or a list"),
        ({"id": "k", "images": ["b.png"], "conversations": TEXT}, "malformed row", "'images' is not read"),
        ({"id": "k", "video": "a.mp4", "conversations": TEXT}, "malformed row", "'video' is not read"),
        ({"id": "k" * 201, "conversations": TEXT}, "malformed row", "key of 201 characters"),
        ({"id": True, "conversations": TEXT}, "malformed row", "'id' must be a string or a whole number"),
        ({"id": 1.5, "conversations": TEXT}, "malformed row", "'id' must be a string or a whole number"),
        ({"id": "", "conversations": TEXT}, "malformed row", "'id' must be a string or a whole number"),
        ({"id": "k", "chosen": TEXT}, "malformed row", "'rejected' must be a list of turns"),
        ({"id": "k", "chosen": "a", "rejected": "b"}, "malformed row", "'chosen' must be a list of turns"),
        ({"id": "k", "chosen": TEXT, "rejected": talk("Was it?", "No.")}, "bad conversation", "different prompts"),
        ({"id": "k", "chosen": TEXT, "rejected": TEXT[:1]}, "bad conversation", "different prompts"),
        ({"id": "k", "chosen": TEXT[:1], "rejected": TEXT[:1]}, "bad conversation", "must end with an answer"),
        ({"id": "k", "chosen": TEXT, "rejected": talk("Is it?", "")}, "bad conversation", "response is empty"),
        ({"id": "k", "conversations": TEXT[1:]}, "bad conversation", "turn 0 is by 'assistant'"),
        ({"id": "k", "conversations": TEXT[:1] * 2}, "bad conversation", "turn 1 is by 'user'"),
        ({"id": "k", "conversations": TEXT[:1]}, "bad conversation", "the last turn is by 'user'"),
        ({"id": "k", "conversations": talk("Is it?", " ")}, "bad conversation", "the assistant's text is empty"),
        ({"id": "k", "conversations": talk("Is it?", "\ud800")}, "bad conversation", "surrogate"),
        ({"id": "k", "conversations": talk("Is it?", "<image>")}, "bad conversation", "stands in an answer"),
        ({"id": "k", "conversations": [{"from": "system", "value": "s"}, *TEXT]}, "bad conversation", "by 'system'"),
        ({"id": "k", "conversations": [{"from": "bot", "value": "s"}]}, "bad conversation", "turn 0 is by 'bot'"),
        ({"id": "k", "image": "b.png", "conversations": TEXT}, "placeholder mismatch", "put '<image>' where"),
        ({"id": "k", "conversations": GOOD}, "placeholder mismatch", "1 '<image>' in the human turns for 0 image"),
        ({"id": "k", "image": ["b.png"] * 2, "conversations": GOOD}, "placeholder mismatch", "for 2 image(s)"),
        ({"id": "k", "image": "", "conversations": GOOD}, "bad image path", "inside an image folder"),
        ({"id": "k", "image": "../outside.png", "conversations": GOOD}, "bad image path", "inside an image folder"),
        ({"id": "k", "image": "coco/../b.png", "conversations": GOOD}, "bad image path", "inside an image folder"),
        ({"id": "k", "image": "/etc/passwd", "conversations": GOOD}, "bad image path", "inside an image folder"),
        ({"id": "k", "image": "none.jpg", "conversations": GOOD}, "missing image", "'none.jpg': no such file in"),
        ({"id": "k", "image": "coco", "conversations": GOOD}, "missing image", "no such file in"),
        ({"id": "k", "image": "a\0b", "conversations": GOOD}, "missing image", "no such file in"),
        ({"id": "k", "image": "\ud800", "conversations": GOOD}, "missing image", "no such file in"),
        ({"id": "k", "image": "x" * 5000, "conversations": GOOD}, "missing image", "no such file in"),
        ({"id": "k", "image": "cut.jpg", "conversations": GOOD}, "undecodable image", "'cut.jpg': cannot be decoded"),
        ({"id": "k", "image": "text.jpg", "conversations": GOOD}, "undecodable image", "not a JPEG, PNG or WebP"),
    ],
)
def test_rows_that_give_no_sample(tmp_path: Path, images: Path, row: Any, kind: str, reason: str) -> None:
    rejection = only_rejection(tmp_path, row, [images])
    assert rejection.kind == kind
    assert reason in rejection.reason
    identified = isinstance(row, dict) and row["id"] == "k"
    assert rejection.key == ("k" if identified else "rows-000000001")


def test_bad_lines_do_not_stop_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    good = json.dumps({"id": "a", "conversations": TEXT})
    file.write_text(f"{{bad\n{good}\n")
    bad, row = read_sources([file])
    assert isinstance(bad, Rejection)
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
    with pytest.raises(DataError, match=r"image 'b\.png': no folder to find it in: name it with --images DIR"):
        list(read_sources([file]))


def test_keys_by_row(tmp_path: Path) -> None:
    rows = [{"id": "same", "conversations": TEXT}] * 2
    file = write_rows(tmp_path / "my set.json", rows)
    found = samples(read_sources([file], keys="row"))
    assert [sample.key for sample in found] == ["my_x20set-000000000", "my_x20set-000000001"]


def write_parquet(file: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A table with RLAIF-V's columns."""
    columns: dict[str, Any] = {
        "ds_name": ["RLAIF-V"] * len(rows),
        "image": [row.get("image", {"bytes": JPG, "path": "a.jpg"}) for row in rows],
        "question": [row.get("question", "What?") for row in rows],
        "chosen": [row.get("chosen", "A dog.") for row in rows],
        "rejected": [row.get("rejected", "A cat.") for row in rows],
        "origin_dataset": ["VQAv2"] * len(rows),
        "origin_split": ['{"model": "x"}'] * len(rows),
        "idx": [row.get("idx", number) for number, row in enumerate(rows)],
        "image_path": ["a.jpg"] * len(rows),
    }
    columns = {name: column for name, column in (columns | changes).items() if column is not None}
    pq.write_table(pa.table(columns), file, row_group_size=20)
    return file


def test_parquet(tmp_path: Path) -> None:
    rows = [{"question": f"Question {number}?", "chosen": f"Yes {number}."} for number in range(75)]
    file = write_parquet(tmp_path / "RLAIF-V-Dataset_000.parquet", rows)
    told: list[int] = []
    found = samples(read_sources([file], advance=told.append))
    assert found == [
        Sample(
            str(number),
            turns(f"<image>\nQuestion {number}?"),
            (JPG,),
            ("jpg",),
            f"Yes {number}.",
            "A cat.",
            "RLAIF-V",
        )
        for number in range(75)
    ]
    assert sum(told) == file.stat().st_size
    assert len(told) > 2


def test_parquet_without_the_optional_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pairs.parquet", [{}], ds_name=None, idx=None, image_path=None)
    sample = samples(read_sources([file]))[0]
    assert (sample.key, sample.source) == ("pairs-000000000", "pairs")


def test_parquet_rows_that_give_no_sample(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": b"junk", "path": "junk.jpg"}},
        {"image": {"bytes": None, "path": "a.jpg"}},
        {"image": None},
        {"question": None},
        {"chosen": None},
        {"rejected": " "},
        {"question": "<image> Look, what?"},
        {"idx": None},
    ]
    found = list(read_sources([write_parquet(tmp_path / "pairs.parquet", rows)]))
    rejections = [row for row in found if isinstance(row, Rejection)]
    assert [(rejection.key, rejection.kind) for rejection in rejections] == [
        ("0", "undecodable image"),
        ("1", "missing image"),
        ("2", "missing image"),
        ("3", "malformed row"),
        ("4", "malformed row"),
        ("5", "bad conversation"),
        ("6", "placeholder mismatch"),
    ]
    assert "junk.jpg" in rejections[0].reason
    assert isinstance(found[-1], Located)
    assert found[-1].sample.key == "pairs-000000007"


def test_files_that_are_no_parquet_of_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), file)
    with pytest.raises(DataError, match=r"pairs\.parquet: no column 'image': it has question, answer"):
        list(read_sources([file]))
    write_parquet(file, [{}] * 60)
    content = file.read_bytes()
    for damaged in (b"", b"hello" * 10, content[:-50], content[:100] + b"\0" * 3000 + content[3100:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"pairs\.parquet: cannot be read as parquet: ") as caught:
            list(read_sources([file]))
        assert "\n" not in str(caught.value)


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
    with pytest.raises(DataError, match="give the same row keys: rename one of them"):
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
        with pytest.raises(DataError, match="tars are indexed in place with `llavamod-offline index`"):
            read_sources([place])


def test_prepared_rows_are_the_same_from_any_number_of_processes(tmp_path: Path, images: Path) -> None:
    """Of every format, with rejections and a file that ends in an error; what is written is the same to the byte."""
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
    """What a tar holds, unpacked: texts and captions beside pictures, at any depth, this project's own files too."""
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    own = tiny_samples(1)[0]
    files = {
        "b.json": json.dumps({"conversations": GOOD}).encode(),
        "b.JPG": JPG,
        "sub/a.txt": b" A dog. ",
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
    rejections = [row for row in found if isinstance(row, Rejection)]
    assert "file 'c.txt': cannot be read: No such file" in rejections[0].reason
    assert "has no text" in rejections[1].reason
    by_row = [row for row in read_sources([Source(folder, "n", rule=rule)], keys="row") if isinstance(row, Located)]
    assert [row.sample.key for row in by_row] == [f"mine-{number:09d}" for number in (0, 1, 3)]
    assert {row.sample.source for row in by_row} == {"n"}
