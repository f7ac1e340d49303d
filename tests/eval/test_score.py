"""What scoring rests on: the collector, and the checksum of the benchmark's files."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import pytest

from eval.files import data_checksum
from eval.score import score_task
from llavamod_offline.errors import EvalError
from tests.eval.fixtures import answers, pope_root, write_jsonl


def test_the_garbage_collector_runs_again_after_a_score_and_after_an_error(tmp_path: Path) -> None:
    root = pope_root(tmp_path / "data", ("yes",))
    path = write_jsonl(tmp_path / "a.jsonl", answers({1: "Yes", 2: "Yes", 3: "Yes"}))
    assert gc.isenabled()
    score_task("pope", root, path)
    assert gc.isenabled()
    with pytest.raises(EvalError):
        score_task("gqa", root, path)
    assert gc.isenabled()
    gc.disable()
    try:
        score_task("pope", root, path)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert not gc.get_freeze_count()


def test_the_checksum_is_of_names_below_the_root_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b.txt", "a-b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = hashlib.sha256()
    for name in ("a/b.txt", "a-b.txt", "c.txt"):  # sorted part by part, as paths compare
        expected.update(f"{name}\0{hashlib.sha256(name.encode()).hexdigest()}\n".encode())
    files = [tmp_path / name for name in ("c.txt", "a-b.txt", "a/b.txt", "c.txt")]
    assert data_checksum(tmp_path, files) == expected.hexdigest()
    monkeypatch.chdir(tmp_path)
    assert data_checksum(Path(), [Path("c.txt"), Path("a-b.txt"), Path("a/b.txt")]) == expected.hexdigest()
    assert data_checksum(tmp_path / "a", files[:1]) == data_checksum(tmp_path, files[:1])  # outside the root: name only
