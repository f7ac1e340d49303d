"""The folders that the demo and the ladder start from."""

from __future__ import annotations

from pathlib import Path

from llavamod_offline.demo.world import write_world


def test_benchmarks_have_as_many_images_as_asked_for(tmp_path: Path) -> None:
    _, benchmarks, _ = write_world(tmp_path, quick=True, benchmark_images=3)
    questions = (benchmarks / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()
    assert len(questions) == 3 * 5
