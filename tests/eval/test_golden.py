"""Published scores from real answers (LLaVA-1.5-13B), if the shared data are available."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from eval.score import score_task

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "eval"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")


def unpack(name: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.decompress((GOLDEN / f"{name}.gz").read_bytes()))
    return target


def test_pope(tmp_path: Path) -> None:
    unpack("pope/llava_pope_test.jsonl", tmp_path / "pope" / "llava_pope_test.jsonl")
    for category in ("adversarial", "popular", "random"):
        name = f"coco_pope_{category}.json"
        unpack(f"pope/{name}", tmp_path / "pope" / "coco" / name)
    score = score_task("pope", tmp_path, unpack("pope/answers.jsonl", tmp_path / "answers.jsonl"))
    assert score.metrics["f1_mean"] == pytest.approx(0.8595, abs=0.00005)
    for category, published in (("adversarial", 0.8446), ("popular", 0.8625), ("random", 0.8714)):
        assert score.metrics[f"f1_{category}"] == pytest.approx(published, abs=0.00005)
    assert (score.n, score.n_missing, score.n_unparsed) == (8910, 0, 0)
    assert "published set" not in score.protocol


def test_scienceqa(tmp_path: Path) -> None:
    for name in ("llava_test_CQM-A.json", "pid_splits.json", "problems.json"):
        unpack(f"scienceqa/{name}", tmp_path / "scienceqa" / name)
    score = score_task("scienceqa", tmp_path, unpack("scienceqa/answers.jsonl", tmp_path / "answers.jsonl"))
    assert score.metrics["img_accuracy"] == pytest.approx(0.7164, abs=0.00005)
    assert score.metrics["accuracy"] == pytest.approx(0.7439, abs=0.00005)
    assert (score.n, score.n_missing) == (4241, 0)
    assert "2,017 questions with an image" in score.protocol
    assert "worded unlike" not in score.protocol
