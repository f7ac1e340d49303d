"""Text as editors on every system save it: read correctly, or refused by one line that names the file and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavamod_offline.data.parse.text_encoding import decode_text
from llavamod_offline.data.rows import Located, RejectedRow, RowError
from llavamod_offline.data.sources.source import Source
from llavamod_offline.data.tars.tar_index import TarSource, index_tars
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.sources.source_files import JPG, TEXT, read_sources, samples
from tests.llavamod_offline.data.tars.foreign_tars import row, write_tar
from tests.llavamod_offline.data.tars.test_tar_index import read_all, rejected

WORDS = "Ein Bär, 熊\nund ein zweiter 🐻"
MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]  # Python writes byte order marks for the last three
BIG_ENDIAN = [("utf-16-be", b"\xfe\xff"), ("utf-32-be", b"\0\0\xfe\xff")]
ENCODED = [pytest.param(WORDS.encode(name), id=name) for name in MARKED] + [
    pytest.param(mark + WORDS.encode(name), id=name) for name, mark in BIG_ENDIAN
]


@pytest.mark.parametrize("content", ENCODED)
def test_marks_are_no_part_of_texts(content: bytes) -> None:
    assert decode_text(content, "a.txt") == WORDS


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "Bär".encode("latin-1"),
            r"file 'a\.txt': not UTF-8 \(byte 0xE4 at position 1\): if it is Latin-1, convert it",
        ),
        ("Bär".encode("utf-16-le"), r"file 'a\.txt': holds NUL bytes: if it is UTF-16, convert it with `iconv"),
        (b"\xff\xfeB\0\xe4", r"file 'a\.txt': not UTF-16.* save it again"),
        (b"A\0dog", r"file 'a\.txt': holds NUL bytes"),
    ],
)
def test_what_is_no_text(content: bytes, problem: str) -> None:
    with pytest.raises(RowError, match=problem) as caught:
        decode_text(content, "a.txt")
    assert caught.value.kind == "malformed row"


CAPTIONS = [
    *((WORDS.replace("\n", ending).encode(name), WORDS) for name in MARKED for ending in ("\n", "\r\n", "\r")),
    (b" A dog.\t\r\n\r\n", "A dog."),
    (b"\xef\xbb\xbf", "its caption is empty"),
    (b" \r\n", "its caption is empty"),
    (b"", "its caption is empty"),
    ("Bär".encode("latin-1"), "file 'a.txt': not UTF-8 (byte 0xE4 at position 1): if it is Latin-1"),
    (b"A\0dog", "file 'a.txt': holds NUL bytes"),
]


@pytest.mark.parametrize(("content", "outcome"), CAPTIONS)
def test_captions(tmp_path: Path, content: bytes, outcome: str) -> None:
    """From a folder and from a tar."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(JPG)
    (folder / "a.txt").write_bytes(content)
    [packed] = read_sources([Source(folder, rule=ReadRule("Describe."))])
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", JPG), ("a.txt", content), ("b.json", row("?", "B"))])
    index_tars([TarSource(tar)], tmp_path / "set", caption_prompt="Describe.")
    answers = {sample.key: sample.turns[-1].text for sample in read_all(tmp_path / "set")}
    if isinstance(packed, Located):
        assert packed.sample.turns[-1].text == answers["a"] == outcome
    else:
        assert packed.reason.startswith(outcome)
        assert rejected(tmp_path / "set")["a"][1].startswith(outcome)


@pytest.mark.parametrize("encoding", [*MARKED, "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_files_of_rows(tmp_path: Path, encoding: str, suffix: str, ending: str) -> None:
    """Also without byte order marks, recognised by the zeros between ASCII characters."""
    rows = [
        json.dumps({"id": number, "conversations": TEXT} | {"note": WORDS}, ensure_ascii=False) for number in range(3)
    ]
    text = f"[{f',{ending}'.join(rows)}]" if suffix == ".json" else ending.join([*rows, ""])
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(text.encode(encoding))
    told: list[int] = []
    assert [sample.key for sample in samples(read_sources([file], advance=told.append))] == ["0", "1", "2"]
    assert sum(told) == file.stat().st_size


def test_files_that_were_joined(tmp_path: Path) -> None:
    line = b"\xef\xbb\xbf" + json.dumps({"conversations": TEXT}).encode() + b"\r\n"
    (tmp_path / "rows.jsonl").write_bytes(line * 2)
    assert len(samples(read_sources([tmp_path / "rows.jsonl"]))) == 2


def test_rows_in_latin_1(tmp_path: Path) -> None:
    """A bad line is rejected, a bad JSON list ends the reading; both messages say how to convert the file."""
    good = json.dumps({"id": "a", "conversations": TEXT}).encode()
    (tmp_path / "rows.jsonl").write_bytes(good + '\n{"id": "ä"}\n'.encode("latin-1"))
    _, bad = read_sources([tmp_path / "rows.jsonl"])
    assert isinstance(bad, RejectedRow)
    assert "iconv -f LATIN1 -t UTF-8" in bad.reason
    (tmp_path / "rows.json").write_bytes(b"[" + good + ', {"id": "ä"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.json: row 0 .*not UTF-8 \(byte 0xE4 .*iconv -f LATIN1 -t UTF-8"):
        list(read_sources([tmp_path / "rows.json"]))


def test_a_tar_with_utf_16(tmp_path: Path) -> None:
    content = json.dumps({"conversations": TEXT}).encode("utf-16")
    index_tars([TarSource(write_tar(tmp_path / "x.tar", [("a.json", content)]))], tmp_path / "set")
    assert read_all(tmp_path / "set")[0].turns[1].text == "Yes."
