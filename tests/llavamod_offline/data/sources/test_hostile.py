"""Hostile files, each with its outcome: rejected with key and reason, or one line of error; never a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavamod_offline.cli import app
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.entrypoint import run_command
from tests.llavamod_offline.data.sources.hostile import PNG, ROWS, TARS, Case

CASES = [*(("index", case) for case in TARS), *(("pack", case) for case in ROWS)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_there_are_enough() -> None:
    names = [case.name for _, case in CASES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize(("command", "case"), CASES, ids=[case.name.replace(" ", "-") for _, case in CASES])
def test_outcome(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    case: Case,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    case.write(folder)
    before = contents(tmp_path)
    monkeypatch.chdir(folder)
    source = next(str(path.name) for path in folder.glob("h.*"))
    images = ["--images", "pictures"] if command == "pack" else []
    options = ["--output", str(tmp_path / "set"), "--workers", "1", "--max-rejected", "1"]
    with pytest.raises(SystemExit) as caught:
        run_command(app, [command, source, *images, *options])
    printed = capsys.readouterr()
    assert {path: content for path, content in contents(tmp_path).items() if "/set" not in path} == before
    assert "Traceback" not in printed.err
    if not case.good and not case.rejected:
        assert (caught.value.code, printed.out) == (2, "")
        assert case.error in printed.err
        assert printed.err.count("\n") == 1
        assert not (tmp_path / "set").exists()
        return
    found = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["key"], row["kind"]) for row in found] == [(key, kind) for key, kind, _ in case.rejected]
    for row, (_, _, reason) in zip(found, case.rejected, strict=True):
        assert reason in row["reason"]
        assert row["file"] == source
    packed = SampleSet.open(tmp_path / "set")
    samples = [packed.read(row, verify=True) for row in range(len(packed))]
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "That."))
    good = Sample("good", turns, (PNG,), ("png",), source="data" if command == "index" else "h")
    assert ([sample for sample in samples if sample.key == "good"] == [good]) is case.good
    for sample in samples:
        assert sample.key in {"good", "bad", "k"}
