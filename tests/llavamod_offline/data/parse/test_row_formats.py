"""Row formats: each format's rows become samples, and each way a row can be wrong becomes a rejection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data.rows import Located, RejectedRow
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.sources.source_files import (
    GOOD,
    JPG,
    PNG,
    TEXT,
    WEBP,
    only_rejection,
    read_sources,
    samples,
    talk,
    turns,
    write_images,
    write_parquet,
    write_rows,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


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


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (17, "malformed row", "expected an object, found int"),
        ({"id": "k"}, "malformed row", "its fields are 'id': expected 'conversations' or 'messages'"),
        ({"id": "k", "instruction": "a", "output": "b"}, "malformed row", "'id', 'instruction', 'output': expected"),
        ({"id": "k", "conversations": TEXT, "chosen": TEXT}, "malformed row", "field 'rejected' must be"),
        ({"id": "k", "conversations": TEXT, "messages": TEXT}, "malformed row", "has both 'conversations' and 'mess"),
        ({"id": "k", "conversations": []}, "malformed row", "must be a list of turns, at least one"),
        ({"id": "k", "conversations": "hi"}, "malformed row", "must be a list of turns"),
        ({"id": "k", "conversations": ["hi"]}, "malformed row", "turn 0: expected an object of strings"),
        ({"id": "k", "conversations": [{"from": "human"}]}, "malformed row", "turn 0: expected an object of strings"),
        ({"id": "k", "conversations": [{"from": "human", "value": 3}]}, "malformed row", "turn 0: expected an object"),
        ({"id": "k", "image": 3, "conversations": GOOD}, "malformed row", "'image' must hold paths, bytes, or objects"),
        ({"id": "k", "image": [3], "conversations": GOOD}, "malformed row", "'image' must hold paths, bytes, or"),
        (
            {"id": "k", "image": "b.png", "images": ["c.webp"], "conversations": GOOD},
            "malformed row",
            "has both 'image'",
        ),
        ({"id": "k", "video": "a.mp4", "conversations": TEXT}, "unsupported media", "has field 'video': only text"),
        ({"id": "k", "audios": ["a"], "conversations": TEXT}, "unsupported media", "has field 'audios': only text"),
        ({"id": "k" * 201, "conversations": TEXT}, "malformed row", "key of 201 characters"),
        ({"id": True, "conversations": TEXT}, "malformed row", "'id' must be a non-empty string or a whole number"),
        ({"id": 1.5, "conversations": TEXT}, "malformed row", "'id' must be a non-empty string or a whole number"),
        ({"id": "", "conversations": TEXT}, "malformed row", "'id' must be a non-empty string or a whole number"),
        ({"id": "k", "chosen": TEXT}, "malformed row", "'rejected' must be a list of turns"),
        ({"id": "k", "chosen": "a", "rejected": "b"}, "malformed row", "'chosen' must be a list of turns"),
        ({"id": "k", "chosen": TEXT, "rejected": TEXT}, "identical answers", "are the same"),
        ({"id": "k", "chosen": TEXT, "rejected": talk("Is it?", " Yes.\n")}, "identical answers", "are the same"),
        ({"id": "k", "conversations": talk("Is it?", "Ye\0s.")}, "bad conversation", "NUL character"),
        ({"id": "k", "chosen": TEXT, "rejected": talk("Was it?", "No.")}, "bad conversation", "different prompts"),
        ({"id": "k", "chosen": TEXT, "rejected": TEXT[:1]}, "bad conversation", "different prompts"),
        ({"id": "k", "chosen": TEXT[:1], "rejected": TEXT[:1]}, "bad conversation", "must end with an answer"),
        ({"id": "k", "chosen": TEXT, "rejected": talk("Is it?", "")}, "bad conversation", "response is empty"),
        ({"id": "k", "conversations": TEXT[1:]}, "bad conversation", "turn 0 is by 'assistant'"),
        ({"id": "k", "conversations": TEXT[:1] * 2}, "bad conversation", "turn 1 is by 'user'"),
        ({"id": "k", "conversations": TEXT[:1]}, "bad conversation", "the last turn is by 'user'"),
        ({"id": "k", "conversations": talk("Is it?", " ")}, "bad conversation", "the assistant's text is empty"),
        ({"id": "k", "conversations": talk("Is it?", "\ud800")}, "bad conversation", "surrogate"),
        ({"id": "k", "conversations": talk("Is it?", "<image>")}, "bad conversation", "is in an answer"),
        ({"id": "k", "conversations": [*TEXT, {"from": "system", "value": "s"}]}, "bad conversation", "by 'system'"),
        (
            {"id": "k", "conversations": TEXT, "system": ["x"]},
            "malformed row",
            "'system' must be text, found list",
        ),
        ({"id": "k", "conversations": [{"from": "bot", "value": "s"}]}, "bad conversation", "turn 0 is by 'bot'"),
        ({"id": "k", "image": "b.png", "conversations": TEXT}, "placeholder mismatch", "put '<image>' where"),
        ({"id": "k", "conversations": GOOD}, "placeholder mismatch", "1 '<image>' in the user's turns for 0 images"),
        ({"id": "k", "image": ["b.png"] * 2, "conversations": GOOD}, "placeholder mismatch", "for 2 images"),
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
        {"question": "<image><image> Look, what?"},
        {"idx": None},
        {"question": "Look at <image>, what?"},
        {"rejected": "A dog. "},
    ]
    found = list(read_sources([write_parquet(tmp_path / "pairs.parquet", rows)]))
    rejections = [row for row in found if isinstance(row, RejectedRow)]
    assert [(rejection.key, rejection.kind) for rejection in rejections] == [
        ("0", "undecodable image"),
        ("1", "missing image"),
        ("2", "missing image"),
        ("3", "malformed row"),
        ("4", "malformed row"),
        ("5", "bad conversation"),
        ("6", "placeholder mismatch"),
        ("9", "identical answers"),
    ]
    assert "junk.jpg" in rejections[0].reason
    assert "2 '<image>' in the user's turns for 1 image" in rejections[6].reason
    samples = [row.sample for row in found if isinstance(row, Located)]
    assert [sample.key for sample in samples] == ["pairs-000000007", "8"]
    assert samples[1].turns[0].text == "Look at <image>, what?"


def test_files_that_are_no_parquet_of_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), file)
    with pytest.raises(DataError, match=r"pairs\.parquet: its columns are question, answer: expected 'conversations'"):
        list(read_sources([file]))
    write_parquet(file, [{}] * 60)
    content = file.read_bytes()
    for damaged in (b"", b"hello" * 10, content[:-50], content[:100] + b"\0" * 3000 + content[3100:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"pairs\.parquet: cannot be read as parquet: ") as caught:
            list(read_sources([file]))
        assert "\n" not in str(caught.value)
