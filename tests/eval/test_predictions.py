"""Reading predictions: both forms, and every kind of broken or hostile file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.predictions import (
    MAX_LINE_BYTES,
    Prediction,
    llava_answer_line,
    prediction_line,
    read_predictions,
)
from llavamod_offline.errors import EvalError

GOOD = {"task": "pope", "id": "1", "image": "a.jpg", "prompt": "Q", "text": "Yes", "n_tokens": 1, "finish": "stop"}


def written(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def line(**changes: Any) -> bytes:
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value != "DROP"}).encode()


def test_ours_and_llavas_forms_are_read(tmp_path: Path) -> None:
    ours = read_predictions(written(tmp_path / "a.jsonl", line(), b"", line(id=7, finish="length")), "pope")
    assert [(p.id, p.text, p.n_tokens, p.finish) for p in ours] == [("1", "Yes", 1, "stop"), ("7", "Yes", 1, "length")]
    theirs = written(tmp_path / "b.jsonl", b'{"question_id": 3, "prompt": "Q", "text": "No", "answer_id": "x"}')
    assert read_predictions(theirs, "pope") == [Prediction("No", "Q", question_id="3")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question_id": 3, "text": "No", "prompt": "Q", "id": "x"}, Prediction("No", "Q", question_id="3")),
        ({"question_id": "3", "text": "No", "id": 7, "image": None}, Prediction("No", "", question_id="3")),
        (
            {"doc_id": 0, "doc": {"question_id": "3", "question": "Q", "answer": "yes"}, "target": "yes",
             "resps": [["No."]], "filtered_resps": ["No"]},
            Prediction("No", "Q", question_id="3", question="Q"),
        ),
        (
            {"doc": {"questionId": 3, "question": "Q"}, "resps": [["No"]]},
            Prediction("No", "Q", question_id="3", question="Q"),
        ),
        (
            {"doc": {"index": 3, "question": "Q"}, "filtered_resps": "No"},
            Prediction("No", "Q", question_id="3", question="Q"),
        ),
    ],
)  # fmt: skip
def test_other_runners_lines_are_read_with_fields_of_their_own(
    tmp_path: Path, row: dict[str, Any], expected: Prediction
) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps(row).encode())
    assert read_predictions(path, "pope") == [expected]


def test_vlmevalkits_tables_are_read(tmp_path: Path) -> None:
    for name, separator in (("a.tsv", "\t"), ("a.CSV", ",")):
        lines = [["index", "question", "A", "prediction", "l2-category"], ["3", '"Is it\nred?"', "x", "B", "y"]]
        path = written(tmp_path / name, *(separator.join(line).encode() for line in lines))
        assert read_predictions(path, "mmbench") == [
            Prediction("B", "Is it\nred?", question_id="3", question="Is it\nred?")
        ]
    import xlsxwriter

    for constant_memory in (True, False):  # strings stored in the cells, or in a file of their own
        with xlsxwriter.Workbook(tmp_path / "a.xlsx", {"constant_memory": constant_memory}) as book:
            sheet = book.add_worksheet()
            for column, name in enumerate(("index", "question", "A", "prediction")):
                sheet.write_string(0, column, name)
            for row, text in enumerate(("B", "", "= 1 & <b>"), 1):
                sheet.write_number(row, 0, row)
                sheet.write_string(row, 1, "Is it\nred?")
                if text:
                    sheet.write_string(row, 3, text)
        expected = [
            Prediction(text, "Is it\nred?", question_id=str(n), question="Is it\nred?")
            for n, text in ((1, "B"), (2, ""), (3, "= 1 & <b>"))
        ]
        assert read_predictions(tmp_path / "a.xlsx", "mmbench") == expected
    for content in (b"PK\x03\x04", b"", b"index\tprediction"):
        written(tmp_path / "bad.xlsx", content)
        with pytest.raises(EvalError, match=r"bad.xlsx: not readable as a spreadsheet: .*: save it as .tsv"):
            read_predictions(tmp_path / "bad.xlsx", "mmbench")
    path = written(tmp_path / "b.tsv", b"index\tquestion", b"3\tQ")
    with pytest.raises(EvalError, match=r"b.tsv: no column 'prediction'"):
        read_predictions(path, "mmbench")


def test_repeated_lines_are_left_out_and_contradicting_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As from two commands on one output, or a file assembled by hand."""
    others = [line(id=str(number), text=f"t{number}") for number in range(2, 5)]
    path = written(tmp_path / "a.jsonl", line(), *others, line(), b"", *others[::-1], line())
    assert [prediction.id for prediction in read_predictions(path, "pope")] == ["1", "2", "3", "4"]
    assert "5 repeated line(s) left out" in caplog.text
    for change in ({"text": "No"}, {"n_tokens": 2}, {"prompt": "Other"}):
        written(path, line(), *others, line(), line(id="3", **change))
        with pytest.raises(EvalError, match=rf"^{path}: lines 3 and 6 are different predictions for '3': remove one "):
            read_predictions(path, "pope")
    theirs = b'{"question_id": 3, "prompt": "Q", "text": "No"}'
    assert len(read_predictions(written(path, theirs, theirs), "pope")) == 2  # several questions may share an id


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.integers(0, 10**6))
def test_what_is_written_is_read_again(text: str, tokens: int) -> None:
    import tempfile

    made = Prediction(text, text, "x", None, "gqa", "i.png", tokens, "stop")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        path.write_bytes(prediction_line(made) + llava_answer_line(5, text, text, "m"))
        assert read_predictions(path, "gqa") == [made, Prediction(text, text, question_id="5")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{not json", "not readable as JSON"),
        (b'"a string"', "expected a JSON object, found str"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (line(text=None), "'text' must be a string, found null"),
        (line(text=3), "'text' must be a string, found 3"),
        (line(text="DROP"), "'text' is missing"),
        (line(prompt=["Q"]), "'prompt' must be a string"),
        (line(id=True), "'id' must be a string, found true"),
        (line(id=1.5), "'id' must be a string, found 1.5"),
        (line(id="DROP"), "has neither 'id'"),
        (b'{"doc": {"question": "Q"}, "resps": [["No"]]}', "'doc' has none of question_id"),
        (b'{"doc": {"question_id": 1}, "resps": [["No"], ["Yes"]]}', "'response' must be a string"),
        (b'{"doc": {"question_id": 1}}', "'response' is missing"),
        (b'{"doc": {"question_id": 1}, "resps": "No"}', "'question' is missing"),
        (line(task="gqa"), "is for task 'gqa', not 'pope'"),
        (line(n_tokens=-1), "'n_tokens' must be a whole number"),
        (line(n_tokens=float("nan")), "'n_tokens' must be a whole number, found NaN"),
        (line(finish="crash"), "'finish' must be one of stop, length"),
        (line(text="a\0b"), "'text' contains a NUL character"),
        (b'{"text": "a\0b"}', "contains a NUL byte"),
        (line(text="\ud800"), "'text' contains a lone surrogate"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (line(text="x" * 10_000_000), f"is longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_broken_line_is_one_error_that_names_it(tmp_path: Path, bad: bytes, message: str) -> None:
    path = written(tmp_path / "p.jsonl", line(), line(id="2"), bad, line(id="3"))
    with pytest.raises(EvalError) as error:
        read_predictions(path, "pope")
    assert str(error.value).startswith(f"{path}: line 3")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(line() + b"\n"), "is compressed with gzip: unpack it first"),
        (b"PK\x03\x04 and so on", "is a zip archive or a spreadsheet"),
        (line().decode().encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    ],
)
def test_a_wrapped_file_is_told_apart_from_a_damaged_one(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvalError) as error:
        read_predictions(path, "pope")
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n" + line(id="2") + b"\r\n")
    assert [prediction.id for prediction in read_predictions(path, "pope")] == ["1", "2"]


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no such predictions file: create one with 'eval-student generate'"):
        read_predictions(tmp_path / "nothing.jsonl", "pope")
