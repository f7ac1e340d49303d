"""`llavamod-offline ladder`: train every student of the table with every seed, and test the claims."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavamod_offline.demo.commands import as_script
from llavamod_offline.demo.results import read_result
from llavamod_offline.demo.scheduler import Step, run_steps
from llavamod_offline.errors import ConfigError
from llavamod_offline.ladder.plan import folder_of, ladder_steps, seed_of, step_name
from llavamod_offline.ladder.report import PAGE_NAME, write_report
from llavamod_offline.ladder.results import COLUMNS, comparison_text, summarise
from llavamod_offline.ladder.seed import RESULTS_NAME, gather_seed, read_seed, seeds_in
from llavamod_offline.progress import ProgressBar
from llavamod_offline.storage.atomic import write_file
from llavamod_offline.storage.lock import locked

SUMMARY_NAME = "ladder.json"
_DONE = "steps.jsonl"  # a line for each command that has ended
_SETTINGS = "settings.json"
_SCRIPT_HEAD = "Every command of the ladder. Run this script in an empty folder."
_WORLD = ("world", "benchmarks", "small_language_model")


def parse_seeds(text: str) -> list[int]:
    """The seeds of `5` (1 to 5) or of a range such as `4-5`. Errors: `ConfigError` for anything else."""
    first, dash, last = text.partition("-")
    numbers = [first, last] if dash else ["1", first]
    if all(number.isascii() and number.isdigit() for number in numbers) and 1 <= int(numbers[0]) <= int(numbers[1]):
        return list(range(int(numbers[0]), int(numbers[1]) + 1))
    raise ConfigError(f"--seeds {text}: give how many, such as 5, or a range that starts at 1 or above, such as 4-5")


def run_ladder(output: Path, *, seeds: Sequence[int], quick: bool, at_once: int | None = None) -> Path:
    """Run or resume the ladder in `output`, and return the path of its summary.

    A seed whose results exist, made here or copied from elsewhere, is not run. The summary and the page, of all seeds
    with results, are rewritten whenever a seed completes.
    Errors: `ConfigError` if `output` holds something else, or a ladder of other sizes; `StepError` if a command fails.
    """
    _check(output, quick)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        write_file(output / _SETTINGS, json.dumps({"quick": quick}) + "\n")
        plan = {seed: ladder_steps(seed, quick=quick) for seed in sorted({*seeds, *seeds_in(output)})}
        results = {seed: read_seed(output, seed, steps) for seed, steps in plan.items()}
        plan = {seed: steps for seed, steps in plan.items() if seed in seeds or results[seed]}
        results = {seed: found for seed, found in results.items() if seed in plan}
        write_file(output / "commands.sh", as_script([step for steps in plan.values() for step in steps], _SCRIPT_HEAD))
        _run(output, plan, results, quick, at_once or max(2, min(len(os.sched_getaffinity(0)), 8)))
        summary = _summarise(output, results, quick)
    print(_claims(summary))
    print(f"\n{output / PAGE_NAME}: the table, and a chart for each claim")
    print(f"{output / SUMMARY_NAME}: all figures; {output / 'commands.sh'}: the commands that made them")
    return output / SUMMARY_NAME


def _check(output: Path, quick: bool) -> None:
    settings = output / _SETTINGS
    if settings.is_file():
        try:
            begun_quick = read_result(settings)["quick"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{settings}: not the settings of a ladder: choose another folder with --output"
            ) from error
        if begun_quick != quick:
            what = "the full ladder: leave --quick out" if quick else "a quick ladder: add --quick"
            raise ConfigError(f"{output}: holds {what}, or choose another folder with --output")
    elif output.exists() and not all((entry / RESULTS_NAME).is_file() for entry in output.iterdir()):
        raise ConfigError(f"{output}: holds files that are not from a ladder: choose another folder with --output")


def _run(
    output: Path, plan: dict[int, list[Step]], results: dict[int, dict[str, Any] | None], quick: bool, at_once: int
) -> None:
    """Run the commands of all seeds without results, and fill these in."""
    steps = [step for seed, found in results.items() if found is None for step in plan[seed]]
    done = _done(output, steps)
    for seed, found in results.items():
        if found is None and step_name(seed, "toyworld") not in done:  # it starts over, and refuses existing folders
            for name in _WORLD:
                shutil.rmtree(output / folder_of(seed) / name, ignore_errors=True)

    def gather(seed: int) -> None:
        if results[seed] is None and seconds.keys() >= {step.name for step in plan[seed]}:
            gather_seed(output, seed, plan[seed], seconds)
            results[seed] = read_seed(output, seed, plan[seed])
            _summarise(output, results, quick)

    seconds = dict(done)
    for seed in plan:
        gather(seed)
    with (
        (output / _DONE).open("a", encoding="utf-8") as log,
        ProgressBar("ladder", len(steps), "command", done=len(done)) as bar,
    ):

        def note(step: Step, took: float) -> None:
            log.write(json.dumps({"name": step.name, "command": step.typed, "seconds": round(took, 2)}) + "\n")
            log.flush()
            seconds[step.name] = took
            bar.advance()
            bar.write(f"{took:6.1f} s  {step.name}")
            gather(step.group)

        run_steps(steps, output, at_once=at_once, on_end=note, done=done)


def _summarise(output: Path, results: dict[int, dict[str, Any] | None], quick: bool) -> dict[str, Any]:
    """Write the summary and the page of the seeds that are complete."""
    found = {seed: complete for seed, complete in results.items() if complete is not None}
    summary = {"date": time.strftime("%Y-%m-%d"), "quick": quick, **summarise(found)}
    write_file(output / SUMMARY_NAME, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    write_report(output / PAGE_NAME, summary, next(iter(found.values()))["examples"])
    return summary


def _done(output: Path, steps: list[Step]) -> dict[str, float]:
    """The seconds of finished commands that read the same now, as do all steps that they need.

    All other lines of these seeds are removed from the log, so that whatever needs them runs again; lines cut short by
    a kill are removed too. Lines of other seeds stay.
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
    lines = [
        f"{claim['verdict']:14} {claim['text']}: {COLUMNS[claim['column']]} {comparison_text(claim)}"
        for claim in summary["claims"].values()
    ]
    return "\n".join(lines)
