"""Questions whose image cannot be read, recorded beside the predictions as JSON lines {"id", "reason"}.

They are part of the score's denominator and count as wrong; the next `generate` tries them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from eval.files import read_jsonl
from llavamod_offline.storage.atomic import write_file

SUFFIX = ".unanswerable.jsonl"


def unanswerable_file(predictions: Path) -> Path:
    """The file that lists the unanswerable questions of a predictions file."""
    return predictions.with_name(predictions.name.removesuffix(".jsonl") + SUFFIX)


def read_unanswerable(predictions: Path) -> dict[str, str]:
    """Read the reasons by example id; empty if nothing is recorded. Errors: `EvalError` naming the line."""
    file = unanswerable_file(predictions)
    rows = read_jsonl(file) if file.is_file() else []
    return {row.identifier("id"): row.text("reason") for row in rows}


def write_unanswerable(predictions: Path, reasons: Mapping[str, str]) -> None:
    """Record the reasons by example id in place of earlier ones; without any, remove the file."""
    file = unanswerable_file(predictions)
    if not reasons:
        file.unlink(missing_ok=True)
        return
    lines = (json.dumps({"id": name, "reason": reason}, ensure_ascii=False) for name, reason in reasons.items())
    write_file(file, "".join(f"{line}\n" for line in lines))
