"""`llavamod-offline demo`: draw a toy world, run the whole pipeline on it, and compare the models."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

from llavamod_offline.demo.commands import as_script
from llavamod_offline.demo.plan import SCRIPT_HEAD, TEACHER, demo_steps
from llavamod_offline.demo.report import write_report
from llavamod_offline.demo.results import COLUMNS, as_cells, summarise
from llavamod_offline.demo.scheduler import Step, run_steps
from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.progress import ProgressBar
from llavamod_offline.storage.atomic import write_file
from llavamod_offline.storage.lock import locked_beside

log = logging.getLogger(__name__)

MARKER = ".llavamod-demo"
AT_ONCE = 2


def run_demo(output: Path, *, quick: bool = False, seed: int = 1) -> Path:
    """Run the demo into `output`, replacing an earlier demo, and return the path of its summary.

    Errors: `ConfigError` if `output` holds anything but a demo; `StepError` if a command fails.
    """
    if not (TEACHER / "config.json").exists():
        raise ModelError(f"{TEACHER}: the toy teacher is missing: reinstall the project")
    with locked_beside(output):
        return _run(output, quick, seed)


def _run(output: Path, quick: bool, seed: int) -> Path:
    """Run the demo into `output`; see `run_demo`."""
    _clear(output)
    started = time.monotonic()
    steps = demo_steps(quick=quick, seed=seed)
    write_file(output / "commands.sh", as_script(steps, SCRIPT_HEAD))
    with ProgressBar("demo", len(steps), "command") as bar:

        def report(step: Step, seconds: float) -> None:
            bar.advance()
            bar.write(f"{seconds:6.1f} s  {step.name}")

        seconds = run_steps(steps, output, at_once=AT_ONCE, on_end=report)
    summary = summarise(output, seconds)
    summary["total_seconds"] = time.monotonic() - started
    write_report(output, summary)
    path = output / "summary.json"
    write_file(path, json.dumps(summary, indent=1) + "\n")
    print(_as_text(summary))
    print(f"\n{output / 'report.html'}: the curves, and some images with each model's answers")
    print(f"{output / 'commands.sh'}: the {len(steps)} commands that the demo ran, in {summary['total_seconds']:.0f} s")
    return path


def _clear(output: Path) -> None:
    """Empty the folder of an earlier demo, and no other."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).exists():
            raise ConfigError(f"{output}: holds files that are not from a demo: choose another folder with --output")
        for entry in output.iterdir():  # the folder may be the current one, or a link
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def _as_text(summary: dict[str, object]) -> str:
    rows, cache, routing = summary["rows"], summary["cache"], summary["routing"]
    assert isinstance(rows, list)
    assert isinstance(cache, dict)
    assert isinstance(routing, dict)
    lines = [list(COLUMNS.values()), *[as_cells(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    text.append(f"\nteacher cache: {cache['positions']:,} positions, {cache['bytes_per_position']:.1f} bytes each")
    text.append(
        "upcycled sparse student: the distilled one after more steps on another set, with cross-entropy; its loss is "
        f"{routing['own']:.4f} with its own routing, {routing['random']:.4f} with random routing"
    )
    return "\n".join(text)
