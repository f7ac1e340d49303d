"""A seed's results: gathered from its commands' files into one, which stands for all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from llavamod_offline.demo.plan import TEACHER as TEACHER_FOLDER
from llavamod_offline.demo.results import parameters_of, read_result
from llavamod_offline.demo.scheduler import Step
from llavamod_offline.errors import ConfigError
from llavamod_offline.ladder.examples import described_images
from llavamod_offline.ladder.plan import folder_of, plan_digest, step_name
from llavamod_offline.ladder.table import ROWS, RUNS, TEACHER, Column
from llavamod_offline.storage.atomic import write_file

RESULTS_NAME = "results.json"
_LOG = logging.getLogger(__name__)

_SCORES = {
    "accuracy": ("gqa", "accuracy"),
    "pope_f1": ("pope", "f1_mean"),
    "response_hallucination": ("object_halbench", "response_hall"),
    "object_hallucination": ("object_halbench", "object_hall"),
}


def gather_seed(output: Path, seed: int, steps: Sequence[Step], seconds: Mapping[str, float]) -> None:
    """Write `results.json` into the folder of a seed whose `steps` have all ended, each after its `seconds`.

    `runs`: by run, its columns and figures from its training. `examples`: images with what models say about them.
    """
    here = output / folder_of(seed)
    runs = {name: _results(here, name, seed, seconds) for name in (TEACHER, *(row.run for row in ROWS))}
    results = {"plan": plan_digest(steps), "runs": runs, "examples": described_images(here)}
    write_file(here / RESULTS_NAME, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def seeds_in(output: Path) -> list[int]:
    """The seeds with results below a folder, of whatever commands."""
    numbers = [file.parent.name.removeprefix("seed-") for file in output.glob(f"seed-*/{RESULTS_NAME}")]
    return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())


def read_seed(output: Path, seed: int, steps: Sequence[Step]) -> dict[str, Any] | None:
    """The results of a seed, made here or elsewhere; None if there are none, or those of other commands.

    Errors: `ConfigError` for a file that is damaged.
    """
    file = output / folder_of(seed) / RESULTS_NAME
    if not file.is_file():
        return None
    try:
        results = read_result(file)
        plan = results["plan"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the results of a seed: copy it again, or remove it to run the seed") from error
    if plan == plan_digest(steps):
        return results
    _LOG.warning("%s: made by different commands from the current ones: not used", file)
    return None


def _results(here: Path, run: str, seed: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    columns = {name: _column(here / "answers" / run, name) for name in get_args(Column)}
    if run == TEACHER:
        parameters = parameters_of(TEACHER_FOLDER)
        about: dict[str, Any] = {"parameters": parameters, "activated_parameters": parameters, "seconds": None}
        return {"columns": columns, **about, "bytes_per_position": None, "expert_load": None}
    summary = read_result(here / "train" / run / "summary.json")
    return {
        "columns": columns,
        "parameters": summary["parameters"],
        "activated_parameters": summary["activated_parameters"],
        "seconds": sum(seconds[step_name(seed, f"train-{one}")] for one in _chain(run)),
        "bytes_per_position": _bytes(here, run),
        "expert_load": summary["metrics"].get("expert_load"),
    }


def _column(answers: Path, name: Column) -> float | None:
    if name not in _SCORES:
        value = read_result(answers / "unseen.json")[name]
    else:
        task, metric = _SCORES[name]
        value = read_result(answers / task / "score.json")["metrics"][metric]
    return None if value is None else float(value)


def _bytes(here: Path, run: str) -> float | None:
    """The bytes per position of a run's cache; None if it has no cache."""
    cache = next((one.cache for one in RUNS if one.name == run), None)
    if cache is None:
        return None
    totals = read_result(here / "caches" / cache / "cache.json")["totals"]
    return float(totals["bytes"] / totals["positions"])


def _chain(run: str) -> list[str]:
    """A run and those that it starts from."""
    parent = next(one.parent for one in RUNS if one.name == run)
    return [run] if parent is None else [run, *_chain(parent)]
