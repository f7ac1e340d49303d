"""JSON read piece by piece gives what parsing it whole gives, while holding little of it in memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sources import json_stream
from llavamod_offline.data.sources.json_stream import stream_array, stream_lines
from llavamod_offline.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def ignore(size: int) -> None:
    """No progress bar."""


def read_array(path: Path) -> list[Any]:
    return list(stream_array(path, ignore))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    head=st.sampled_from(["", " \n", "\ufeff"]),
    tail=st.sampled_from(["", "\n \n"]),
)
def test_any_array_in_any_pieces(
    tmp_path: Path, values: list[Any], chunk: int, indent: int | None, ascii_only: bool, head: str, tail: str
) -> None:
    path = tmp_path / "rows.json"
    content = head + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + tail
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert list(stream_array(path, told.append)) == values
    assert sum(told) == path.stat().st_size


def test_numbers_are_not_cut_at_a_pieces_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[12345, 1.5e10, -7]")
    for chunk in range(1, 12):
        monkeypatch.setattr(json_stream, "_CHUNK", chunk)
        assert read_array(path) == [12345, 1.5e10, -7]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "expected a JSON list of rows, but the file is empty"),
        (b'{"a": 1}', r"found '\{': name a file of one object per line \.jsonl"),
        (b"hello", "expected a JSON list of rows, found 'h'"),
        (b'[{"a": 1}, {"a"', r"row 1 \(character 15\): Expecting ':' delimiter"),
        (b'[{"a": 1}, ', r"row 1 \(character 11\): Expecting value"),
        (b'[{"a": 1}', r"row 1 .*the file ends inside the list"),
        (b'[{"a": 1} {"a": 2}]', r"row 1 \(character 11\): expected ',' or '\]'"),
        (b'[{"a": 1},]', r"row 1 \(character 10\): Expecting value"),
        (b'[{"a": 1}, nope]', r"row 1 \(character 11\): Expecting value"),
        (b"[1] [2]", "unexpected text after the list"),
        (b'["\xff"]', r"not UTF-8 \(byte 0xFF at position \d\): if it is Latin-1, convert it with `iconv"),
        (b'["\xc3', r"not UTF-8 \(byte 0xC3"),
        (b"[" * 200_000, "recursion"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)
def test_what_is_no_array(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_array(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_rows_before_a_fault_are_yielded(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a": }]')
    rows = stream_array(path, ignore)
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="row 2 "):
        next(rows)


def test_a_row_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ROW", 1000)
    monkeypatch.setattr(json_stream, "_CHUNK", 100)
    path = tmp_path / "rows.json"
    path.write_text('["' + "a" * 100_000)
    told: list[int] = []
    with pytest.raises(DataError, match=r"row 0 .*no valid JSON within 1000 characters"):
        list(stream_array(path, told.append))
    assert sum(told) < 3000
    path.write_text('"' + "a" * 100_000)
    with pytest.raises(DataError, match="row 0 has more than 1000 bytes"):
        list(stream_lines(path, ignore))


def test_memory_is_a_few_pieces(tmp_path: Path) -> None:
    """30 MB of rows pass through in the memory of a few pieces."""
    path = tmp_path / "rows.json"
    row = json.dumps({"id": 0, "text": "word " * 1000})
    with path.open("w") as stream:
        stream.write("[" + ",\n".join([row] * 6000) + "]")
    assert path.stat().st_size > 30 * 10**6
    tracemalloc.start()
    assert sum(1 for _ in stream_array(path, ignore)) == 6000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    buffer = io.BytesIO(b'\xef\xbb\xbf{"a": 1}\n\n  \n{bad}\n[2]\r\n\xff\n{"a": 3}')
    path.write_bytes(buffer.getvalue())
    told: list[int] = []
    rows = list(stream_lines(path, told.append))
    assert [number for number, _ in rows] == [0, 3, 4, 5, 6]
    assert [value for _, value in rows if not isinstance(value, RowError)] == [{"a": 1}, [2], {"a": 3}]
    bad = [value for _, value in rows if isinstance(value, RowError)]
    assert {error.kind for error in bad} == {"malformed row"}
    assert all("not valid JSON: " in str(error) for error in bad)
    assert sum(told) == path.stat().st_size
