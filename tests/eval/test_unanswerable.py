"""Unreadable images: everything else is answered, the file is named, and the score says what it counts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.export.answers import export
from eval.generate import EvalGenerateConfig, generate
from eval.predictions import read_predictions
from eval.score import score_task
from eval.unanswerable import read_unanswerable, unanswerable_file
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import MMBENCH_ROWS, pope_root, write_jsonl, write_tsv
from tests.tiny import tiny_image, write_tiny_llava


def encoded(mode: str, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (30, 20)).save(buffer, kind, **settings)
    return buffer.getvalue()


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BAD: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(tiny_image(0, (300, 200), "JPEG")[:900]),
    "empty": lambda file: file.write_bytes(b""),
    "a text": lambda file: file.write_text("404: not found"),
    "another format": lambda file: file.write_bytes(encoded("RGB", "TIFF")),
    "too large": lambda file: file.write_bytes(encoded("1", "PNG").replace(b"\0\0\0\x1e", b"\0\x01\0\0", 1)),
    "a folder": make_folder,
}
GOOD = {
    "CMYK": lambda: encoded("CMYK", "JPEG"),
    "alpha": lambda: encoded("RGBA", "PNG"),
    "palette": lambda: encoded("P", "PNG"),
    "16 bit": deep,
    "animated": animated,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("model") / "student")


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> EvalGenerateConfig:
    root, output = pope_root(tmp_path / "data"), tmp_path / "out"
    return EvalGenerateConfig(
        model=str(model), root=str(root), output=str(output), tasks=["pope"], batch_size=5, max_new_tokens=3
    )


def image(settings: EvalGenerateConfig, number: int) -> Path:
    return Path(settings.root) / "pope" / "val2014" / f"COCO_val2014_{number:012d}.png"


@pytest.mark.parametrize("kind", BAD)
def test_all_other_questions_are_answered(
    settings: EvalGenerateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    file = image(settings, 1)
    good = file.read_bytes()
    BAD[kind](file)
    for _ in range(2):  # a rerun does not stop there either
        caplog.clear()
        path = generate(settings)["pope"]
        assert {found.id for found in read_predictions(path, "pope")} == {str(n) for n in range(1, 13)} - set("26") - {
            "10"
        }
        reasons = read_unanswerable(path)
        assert list(reasons) == ["2", "6", "10"]
        assert all(str(file) in reason and "\n" not in reason for reason in reasons.values())
        assert f"3 of 12 questions cannot be answered (they count as wrong), the first: {reasons['2']}" in caplog.text
        assert [json.loads(line)["text"] for line in (path.parent / "answers.jsonl").read_text().splitlines()][1] == ""
    score = score_task("pope", Path(settings.root), path)
    assert (score.n, score.n_missing, score.n_unanswerable) == (12, 0, 3)
    assert "3 unanswerable questions (image not readable) counted as wrong" in score.protocol
    assert "missing answers" not in score.protocol
    assert all(score.verdicts[name].right == 0 for name in reasons)
    export("pope", Path(settings.root), path, tmp_path / "again.jsonl", model="student")
    assert (tmp_path / "again.jsonl").read_bytes() == (path.parent / "answers.jsonl").read_bytes()
    if file.is_dir():
        file.rmdir()
    file.write_bytes(good)
    generate(settings)
    assert not unanswerable_file(path).exists()
    assert score_task("pope", Path(settings.root), path).n_unanswerable == 0


@pytest.mark.parametrize("kind", GOOD)
def test_unusual_images_are_answered(settings: EvalGenerateConfig, kind: str) -> None:
    image(settings, 1).write_bytes(GOOD[kind]())
    path = generate(settings)["pope"]
    assert len(read_predictions(path, "pope")) == 12
    assert not unanswerable_file(path).exists()


def test_an_answer_that_is_neither_given_nor_unanswerable_is_missing(settings: EvalGenerateConfig) -> None:
    image(settings, 1).write_bytes(b"")
    path = generate(settings)["pope"]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(EvalError, match=r"1 question \('1'\) without a prediction"):
        score_task("pope", Path(settings.root), path)
    assert score_task("pope", Path(settings.root), path, allow_missing=True).n_missing == 1


def test_a_folder_without_most_images_is_refused_before_the_model_is_loaded(
    settings: EvalGenerateConfig, tmp_path: Path
) -> None:
    for number in (0, 1, 2):
        image(settings, number).unlink()
    with pytest.raises(EvalError, match=r"000000000000.png: no such image \(9 of 'pope' are missing\)"):
        generate(replace(settings, model=str(tmp_path / "no-model")))
    assert not Path(settings.output).exists()


def test_a_table_without_images_can_be_scored_but_not_answered(settings: EvalGenerateConfig, tmp_path: Path) -> None:
    columns = tuple(name for name in MMBENCH_ROWS[0] if name != "image")
    write_tsv(tmp_path / "data" / "mmbench" / "mmbench_dev_20230712.tsv", MMBENCH_ROWS, columns)
    rows = [{"question_id": int(row["index"]), "text": row["answer"]} for row in MMBENCH_ROWS]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert score_task("mmbench", tmp_path / "data", path).metrics["circular"] == 1.0
    with pytest.raises(EvalError, match=r"mmbench_dev_20230712.tsv, 'image' of the row at byte \d+: no such image"):
        generate(replace(settings, tasks=["mmbench"], model=str(tmp_path / "no-model")))


@pytest.mark.parametrize("value", ["", "no base64", "QUJD"])
def test_an_image_in_a_table_that_is_none_is_named_by_its_place(
    settings: EvalGenerateConfig, tmp_path: Path, value: str
) -> None:
    rows = [{**row, "image": value} if row["index"] == "2" else row for row in MMBENCH_ROWS]
    file = write_tsv(tmp_path / "data" / "mmbench" / "mmbench_dev_20230712.tsv", rows)
    path = generate(replace(settings, tasks=["mmbench"]))["mmbench"]
    reasons = read_unanswerable(path)
    assert list(reasons) == ["2"]
    assert f"{file}, 'image' of the row at byte " in reasons["2"]
    assert score_task("mmbench", tmp_path / "data", path).n_unanswerable == 1
