"""MMBench. Sources: llava/eval/model_vqa_mmbench.py (prompt, missing cells), convert_mmbench_for_submission.py (xlsx),
the published TSV (rotations in the index), VLMEvalKit's prefetch (reading of letters)."""

from __future__ import annotations

import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from eval.export.answers import export
from eval.score import score_task, sidecar
from eval.tasks import TASKS
from eval.tasks.mmbench import CHINESE, ENGLISH, is_missing, parse
from llavamod_offline.errors import ConfigError, EvalError
from tests.eval.fixtures import (
    MMBENCH_COLUMNS,
    MMBENCH_OPTIONS,
    MMBENCH_ROWS,
    answers,
    mmbench_row,
    scored,
    write_jsonl,
    write_tsv,
)
from tests.tiny import tiny_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tsv(tmp_path / "data" / "mmbench" / "mmbench_dev_20230712.tsv", MMBENCH_ROWS)
    write_tsv(tmp_path / "data" / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv", MMBENCH_ROWS)
    return tmp_path / "data"


def test_a_limit_keeps_the_rotations_of_its_questions(root: Path, tmp_path: Path) -> None:
    """Without them, `circular` would be `vanilla`."""
    whole = ENGLISH.load(root)
    first = ENGLISH.first(whole, 1)
    assert [example.id for example in first] == ["1", "1000001", "2000001"]
    assert {example.reference.group for example in first} == {1}
    assert ENGLISH.first(whole, None) == whole
    predictions = write_jsonl(tmp_path / "a.jsonl", answers(dict.fromkeys(("1", "1000001", "2000001"), "A")))
    sidecar(predictions).write_text('{"limit": 1}')
    score = score_task("mmbench", root, predictions)
    assert (score.n, score.limit) == (3, 1)


def test_prompts(root: Path) -> None:
    english, chinese = ENGLISH.load(root), CHINESE.load(root)
    assert english[0].prompt == (
        'What is "it" 1?\nA. a red cat\nB. a dog\nC. two birds\nD. none of them\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert english[3].prompt.startswith('Line one\nline two\nWhat is "it" 2?\nA. yes\nB. no\nAnswer')
    assert chinese[3].prompt.endswith("B. no\n请直接回答选项字母。")


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "None", "none", "NONE", "N/A", "NA", "null"])
def test_cells_that_count_as_missing_end_the_options(root: Path, cell: str) -> None:
    """pandas' missing values, then `is_none`: an option "None" ends the list of options."""
    assert is_missing(cell)
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", [mmbench_row(1, ("x", "y", cell, "w"), "A")])
    assert ENGLISH.load(root)[0].reference.options == ("x", "y")
    assert not is_missing("nothing")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("(B) a dog", "B"),
        ("(B)", "B"),
        ("B: a dog", "B"),
        ("B, I think", "B"),
        ("The answer is B", "B"),
        ("答案是B。", "B"),
        ("选项 C", "C"),
        ("B or C", "Z"),
        ("B, not C", "B"),  # a leading letter decides
        ("Option B and again B", "B"),
        ("A", "A"),
        ("Option A", "A"),
        ("There is A tree in front", "Z"),  # an article among more than three words
        ("A dog", "A"),  # no punctuation, two words: the letter
        ("I can see a dog here", "B"),  # the text of one option
        ("A DOG is here, as you see", "B"),
        ("a dog and two birds", "Z"),
        ("E", "Z"),
        ("b", "Z"),
        ("", "Z"),
        ("BD", "Z"),
        ("I cannot tell", "Z"),
    ],
)
def test_reading_of_letters(text: str, letter: str) -> None:
    assert parse(text, MMBENCH_OPTIONS) == letter


def test_circular_asks_for_every_rotation(root: Path) -> None:
    right = {"1": "A", "1000001": "B", "2000001": "C", "2": "B", "1000002": "A"}
    assert scored(ENGLISH, root, right).metrics == {
        "circular": 1.0,
        "vanilla": 1.0,
        "coarse": 1.0,
        "count": 1.0,
        "identity": 1.0,
    }
    result = scored(ENGLISH, root, {**right, "2000001": "A"})
    assert result.metrics["circular"] == 0.5
    assert result.metrics["vanilla"] == 1.0
    assert result.metrics["identity"] == 0.0
    assert result.metrics["count"] == 1.0
    result = scored(ENGLISH, root, {**right, "1": "I cannot tell"})
    assert result.metrics["vanilla"] == 0.5
    assert result.n_unparsed == 1
    assert "20.00% of rows not read" in result.notes
    assert result.verdicts["1"].read_as == ""


def test_circular_equals_the_official_loop(root: Path) -> None:
    """Rows with equal index modulo 1,000,000 are one question, right if all its rows are; whatever the file's order."""
    rng = random.Random(5)
    rows: list[dict[str, str]] = []
    for number in (*range(20), 999_999):
        count = rng.choice((2, 3, 4))
        for turn in range(rng.choice((count, count - 1))):
            options = MMBENCH_OPTIONS[:count]
            name = rng.choice(("coarse", "fine"))
            row = mmbench_row(turn * 1_000_000 + number, options, "ABCD"[turn % count])
            rows.append(
                row | {"category": f"{number % 3}", "l2-category": name if turn == 0 else rows[-1]["l2-category"]}
            )
    rng.shuffle(rows)
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", rows)
    texts = {row["index"]: row["answer"] if rng.random() < 0.8 else rng.choice("ABCDZ") for row in rows}
    groups: dict[int, list[tuple[int, bool, str]]] = {}
    for row in rows:
        index = int(row["index"])
        right = texts[row["index"]] == row["answer"]
        groups.setdefault(index % 1_000_000, []).append((index, right, row["l2-category"]))
    metrics = scored(ENGLISH, root, texts).metrics
    hits = {group: all(right for _, right, _ in found) for group, found in groups.items()}
    assert metrics["circular"] == pytest.approx(sum(hits.values()) / len(groups))
    assert metrics["vanilla"] == pytest.approx(sum(min(found)[1] for found in groups.values()) / len(groups))
    for name in ("coarse", "fine"):
        of_name = [hits[group] for group, found in groups.items() if found[0][2] == name]
        assert metrics[name] == pytest.approx(sum(of_name) / len(of_name))
    assert metrics["0"] == pytest.approx(sum(hits[group] for group in groups if group % 3 == 0) / 8)


def test_both_versions_are_published_sets(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    """20231003 has 4329 rows, 20230712 4377."""
    assert set(ENGLISH.official_n) == {4329, 4377}
    path = write_jsonl(tmp_path / "a.jsonl", answers(dict.fromkeys((1, 1_000_001, 2_000_001, 2, 1_000_002), "A")))
    assert "not the published set of 4329 or 4377" in score_task("mmbench", root, path).protocol
    monkeypatch.setitem(TASKS, "mmbench", replace(ENGLISH, official_n=(4, 5)))
    assert "published set" not in score_task("mmbench", root, path).protocol


def test_images_are_read_from_the_tsv(root: Path) -> None:
    for example in ENGLISH.load(root):
        assert example.source is not None
        assert example.source.read() == tiny_image(int(example.id) % 1_000_000)


def test_llavas_answers_hold_the_question_alone_as_prompt(root: Path, tmp_path: Path) -> None:
    texts: dict[str | int, str] = {1: "A", 1_000_001: "B", 2_000_001: "C", 2: "B", 1_000_002: "A"}
    prompts: dict[str | int, str] = {int(example.id): example.question for example in ENGLISH.load(root)}
    path = write_jsonl(tmp_path / "a.jsonl", answers(texts, prompts))
    score = score_task("mmbench", root, path)
    assert score.metrics["circular"] == 1.0
    assert "worded unlike" not in score.protocol


def cells(path: Path) -> list[dict[str, tuple[str | None, str]]]:
    """A sheet's rows: each column's cell type and text."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    sheet = zipfile.ZipFile(path).read("xl/worksheets/sheet1.xml")
    return [
        {cell.attrib["r"].rstrip("0123456789"): (cell.get("t"), "".join(cell.itertext())) for cell in line}
        for line in ElementTree.fromstring(sheet).iter(f"{space}row")
    ]


def test_the_upload_has_the_official_columns_and_raw_answers(root: Path, tmp_path: Path) -> None:
    texts: dict[str | int, str] = {1: "A", 1_000_001: "B.", 2_000_001: "C", 2: "B", 1_000_002: "A"}
    path = write_jsonl(tmp_path / "a.jsonl", answers(texts))
    export("mmbench", root, path, tmp_path / "upload.xlsx")
    table = cells(tmp_path / "upload.xlsx")
    assert [text for _, text in table[0].values()] == [
        *("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    ]
    assert table[2]["A"] == (None, "1000001")
    assert table[2]["G"] == ("inlineStr", "B.")
    assert "E" not in table[4]
    first = (tmp_path / "upload.xlsx").read_bytes()
    export("mmbench", root, path, tmp_path / "upload.xlsx")
    assert (tmp_path / "upload.xlsx").read_bytes() == first


def test_an_upload_of_the_first_questions_alone_is_refused(root: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", answers({1: "A", 1_000_001: "B", 2_000_001: "C"}))
    sidecar(path).write_text(json.dumps({"limit": 2}))
    with pytest.raises(
        ConfigError, match=r"the first 2 questions only, .* generate without limit, or export as .jsonl"
    ):
        export("mmbench", root, path, tmp_path / "upload.xlsx")
    export("mmbench", root, path, tmp_path / "answers.jsonl")
    assert not (tmp_path / "upload.xlsx").exists()


@pytest.mark.parametrize(
    "text", ["=1+1", "=cmd|'/c calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "<f>1</f>", "_x0041_", "\x01"]
)
def test_no_answer_becomes_a_formula(root: Path, tmp_path: Path, text: str) -> None:
    texts: dict[str | int, str] = dict.fromkeys((1, 1_000_001, 2_000_001, 2, 1_000_002), text)
    export("mmbench", root, write_jsonl(tmp_path / "a.jsonl", answers(texts)), tmp_path / "u.xlsx")
    sheet = zipfile.ZipFile(tmp_path / "u.xlsx").read("xl/worksheets/sheet1.xml").decode()
    assert "<f" not in sheet
    shown = {"_x0041_": "_x005F_x0041_", "\x01": "_x0001_"}.get(text, text.strip())
    assert cells(tmp_path / "u.xlsx")[1]["G"] == ("inlineStr", shown)


def test_an_answer_longer_than_a_cell_is_refused(root: Path, tmp_path: Path) -> None:
    texts: dict[str | int, str] = dict.fromkeys((1, 1_000_001, 2_000_001, 2, 1_000_002), "x" * 32_768)
    with pytest.raises(EvalError, match="row 2: a text of 32768 characters"):
        export("mmbench", root, write_jsonl(tmp_path / "a.jsonl", answers(texts)), tmp_path / "u.xlsx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "E"}, "row 1: answer 'E' is not the letter of one of its 4 options"),
        ({"answer": ""}, "row 1: answer '' is not the letter"),
        ({"answer": "AB"}, "row 1: answer 'AB' is not the letter"),
        ({"index": "x"}, "row 1: index 'x' is not a whole number"),
    ],
)
def test_bad_rows_are_named(root: Path, changes: dict[str, Any], message: str) -> None:
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", [mmbench_row(1, MMBENCH_OPTIONS, "A") | changes])
    with pytest.raises(EvalError, match=message):
        ENGLISH.load(root)


def test_a_tsv_of_another_form_is_named(root: Path) -> None:
    path = root / "mmbench" / "mmbench_dev_20230712.tsv"
    write_tsv(path, MMBENCH_ROWS, tuple(name for name in MMBENCH_COLUMNS if name != "answer"))
    with pytest.raises(EvalError, match="no column 'answer': use the TSV of MMBench's dev split"):
        ENGLISH.load(root)
    path.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tQ\n")
    with pytest.raises(EvalError, match="row 1 has 2 fields for 6 columns"):
        ENGLISH.load(root)
    path.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tQ\rR\ta\tb\tA\tx\n", newline="")
    with pytest.raises(EvalError, match="not readable as a table"):
        ENGLISH.load(root)


def test_columns_that_are_not_there_are_no_error_in_the_upload(root: Path, tmp_path: Path) -> None:
    columns = tuple(name for name in MMBENCH_COLUMNS if name not in ("comment", "source", "hint"))
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", MMBENCH_ROWS[:1], columns)
    export("mmbench", root, write_jsonl(tmp_path / "a.jsonl", answers({1: "A"})), tmp_path / "u.xlsx")
    assert cells(tmp_path / "u.xlsx")[0]["G"][1] == "prediction"
