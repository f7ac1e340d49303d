"""The charts of committed results: every target is drawn, and the file is well-formed."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.benchmarks.language_model import CACHED, RIVALS

ROOT = Path(__file__).parents[3]
NAMESPACE = "{http://www.w3.org/2000/svg}"


def _draw(name: str, result: Path, picture: Path) -> ElementTree.Element:
    command = [sys.executable, "-m", f"tests.benchmarks.charts.{name}", str(result), str(picture)]
    subprocess.run(command, cwd=ROOT, check=True)
    return ElementTree.fromstring(picture.read_text())


def test_the_committed_picture_is_that_of_the_committed_result(tmp_path: Path) -> None:
    results = ROOT / "tests" / "benchmarks" / "results"
    _draw("readings", results / "readings.json", tmp_path / "readings.svg")
    assert (tmp_path / "readings.svg").read_bytes() == (results / "readings.svg").read_bytes()


def test_a_line_for_every_target(tmp_path: Path) -> None:
    """The right panel shows distances from the live teacher, so leaves that out; several seeds give error bars."""
    targets = ("live", *CACHED, *RIVALS)
    rows = [
        {"target": target, "seed": seed, "bytes": 1.0, "step": step, "kl": 2 - step / 100 + place * step / 1e4 + seed}
        for place, target in enumerate(targets)
        for seed in (0, 1)
        for step in (0, 50, 100)
    ]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"rows": rows}))
    picture = _draw("language_model", result, tmp_path / "picture.svg")
    left, right, legend = picture.findall(f"{NAMESPACE}g")
    lines = [panel.findall(f"{NAMESPACE}path[@stroke-width]") for panel in (left, right)]
    assert [len(found) for found in lines] == [len(targets), len(targets) - 1]
    assert len(legend.findall(f"{NAMESPACE}text")) == len(targets)
    heights = [float(str(line.get("d")).split()[-1]) for line in lines[1]]
    assert heights == sorted(heights, reverse=True)  # a larger value is drawn higher up
