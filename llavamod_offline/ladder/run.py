"""`llavamod-offline ladder`: train every student of the table with every seed, and test the claims."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from llavamod_offline.demo.commands import as_script
from llavamod_offline.demo.scheduler import Step, run_steps
from llavamod_offline.errors import ConfigError
from llavamod_offline.ladder.plan import folder_of, ladder_steps, seed_of, step_name
from llavamod_offline.ladder.report import write_report
from llavamod_offline.ladder.results import summarise
from llavamod_offline.progress import ProgressBar
from llavamod_offline.storage.atomic import write_file
from llavamod_offline.storage.lock import locked

SUMMARY_NAME = "ladder.json"
_DONE = "steps.jsonl"  # a line for each command that has ended
_SETTINGS = "settings.json"
_SCRIPT_HEAD = "Every command of the ladder. Run this script in an empty folder."
_WORLD = ("world", "benchmarks", "small_language_model")


def run_ladder(output: Path, *, seeds: int, quick: bool, at_once: int | None = None) -> Path:
    """Run or resume the ladder in `output`, and return the path of its summary.

    Errors: `ConfigError` if `output` holds something else, or a ladder of other sizes; `StepError` if a command fails.
    """
    _check(output, quick)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        write_file(output / _SETTINGS, json.dumps({"quick": quick}) + "\n")
        return _run(output, seeds, quick, at_once or max(2, min(len(os.sched_getaffinity(0)), 8)))


def _check(output: Path, quick: bool) -> None:
    settings = output / _SETTINGS
    if settings.is_file():
        if json.loads(settings.read_text())["quick"] != quick:
            what = "the full ladder: leave --quick out" if quick else "a quick ladder: add --quick"
            raise ConfigError(f"{output}: holds {what}, or choose another folder with --output")
    elif output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output}: holds files that are not from a ladder: choose another folder with --output")


def _run(output: Path, seeds: int, quick: bool, at_once: int) -> Path:
    steps = ladder_steps(seeds, quick=quick)
    write_file(output / "commands.sh", as_script(steps, _SCRIPT_HEAD))
    done = _done(output, steps)
    for seed in range(1, seeds + 1):
        if step_name(seed, "toyworld") not in done:  # it begins anew, and refuses folders that exist
            for name in _WORLD:
                shutil.rmtree(output / folder_of(seed) / name, ignore_errors=True)
    with (
        (output / _DONE).open("a", encoding="utf-8") as log,
        ProgressBar("ladder", len(steps), "command", done=len(done)) as bar,
    ):

        def note(step: Step, seconds: float) -> None:
            log.write(json.dumps({"name": step.name, "command": step.typed, "seconds": round(seconds, 2)}) + "\n")
            log.flush()
            bar.advance()
            bar.write(f"{seconds:6.1f} s  {step.name}")

        seconds = run_steps(steps, output, at_once=at_once, on_end=note, done=done)
    summary = {"date": time.strftime("%Y-%m-%d"), "quick": quick, **summarise(output, seeds, seconds)}
    path = output / SUMMARY_NAME
    write_file(path, json.dumps(summary, indent=1) + "\n")
    print(_claims(summary))
    print(f"\n{write_report(output, summary)}: the table, and a chart for each claim")
    print(f"{path}: all figures; {output / 'commands.sh'}: the {len(steps)} commands that made them")
    return path


def _done(output: Path, steps: list[Step]) -> dict[str, float]:
    """The seconds of the commands that have ended, as they would be typed now, and so have all that they need.

    All other lines of these seeds are removed from the log, so that what needs them runs again; so is a line that a
    kill has torn. Lines of other seeds stay.
    """
    file = output / _DONE
    ended: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        ended[entry["name"]] = entry
    done: dict[str, float] = {}
    for step in steps:  # a step follows those that it needs
        if ended.get(step.name, {}).get("command") == step.typed and done.keys() >= set(step.needs):
            done[step.name] = ended[step.name]["seconds"]
    asked = {seed_of(step.name) for step in steps}
    kept = [entry for name, entry in ended.items() if name in done or seed_of(name) not in asked]
    write_file(file, "".join(json.dumps(entry) + "\n" for entry in kept))
    return done


def _claims(summary: dict[str, Any]) -> str:
    verdicts = {True: "holds", False: "does not hold", None: "too few seeds"}
    lines = [
        f"{verdicts[claim['holds']]:14} {claim['text']}: {claim['difference']:+.4f}, p = {claim['p']:.3f}"
        for claim in summary["claims"].values()
    ]
    return "\n".join(lines)
