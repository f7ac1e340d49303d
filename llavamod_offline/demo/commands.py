"""Commands that the demo, the ladder and others share, and scripts of commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavamod_offline.demo.scheduler import REJECTED_STATUS, Step


def pack_command(world: Path, name: str, sets: Path) -> tuple[str, ...]:
    """Pack a set of a toy world into `sets`."""
    preferences = name == "preference"
    source = world / f"{name}.{'parquet' if preferences else 'json'}"
    images = () if preferences else ("--images", str(world / "images"))
    return ("llavamod-offline", "pack", str(source), "--output", str(sets / name), *images)


def answer_command(
    model: str | Path, *, root: str | Path, output: Path, tasks: Sequence[str], batch_size: int
) -> tuple[str, ...]:
    """Answer benchmarks' questions."""
    settings = (f"root={root}", f"output={output}", f"tasks=[{','.join(tasks)}]", f"batch_size={batch_size}")
    return ("eval-student", "generate", f"model={model}", *settings)


def score_command(task: str, *, root: str | Path, answers: Path) -> tuple[str, ...]:
    """Score a benchmark's answers; the scores go beside them, into `score.json`."""
    files = ("--predictions", str(answers / task / "predictions.jsonl"), "--output", str(answers / task / "score.json"))
    return ("eval-student", "score", task, "--root", str(root), *files)


def as_script(steps: Sequence[Step], about: str) -> str:
    """The commands as a shell script; a status that only reports rejected samples is not a failure."""
    lines = (f"{step.typed} || [ $? -eq {REJECTED_STATUS} ]" if step.may_reject else step.typed for step in steps)
    return f"#!/bin/sh\n# {about}\nset -e\n" + "".join(f"{line}\n" for line in lines)
