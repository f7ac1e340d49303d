"""The ladder's results: every row's columns for every seed, their means and spreads, and the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

from llavamod_offline.demo.plan import TEACHER as TEACHER_FOLDER
from llavamod_offline.demo.results import parameters_of, read_result
from llavamod_offline.ladder.claims import compare
from llavamod_offline.ladder.plan import folder_of, step_name
from llavamod_offline.ladder.table import CLAIMS, ROWS, RUNS, TEACHER, Column, TableRow

COLUMNS: dict[str, str] = {
    "accuracy": "accuracy",
    "pope_f1": "POPE F1",
    "response_hallucination": "descriptions with absent objects",
    "object_hallucination": "absent objects of those named",
    "kl": "KL from the teacher",
    "calibration_error": "calibration error",
}
Values = dict[Column, list[float]]

_WANTED = {"accuracy": "higher", "pope_f1": "higher"}  # all others: lower
_SCORES = {
    "accuracy": ("gqa", "accuracy"),
    "pope_f1": ("pope", "f1_mean"),
    "response_hallucination": ("object_halbench", "response_hall"),
    "object_hallucination": ("object_halbench", "object_hall"),
}


def summarise(output: Path, seeds: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Gather `rows` and `claims` from the files of the commands, which ended after so many `seconds` each.

    A column is {"values": one a seed, "mean", "spread": their standard deviation}; `difference` and `p` compare it with
    the row that `compared_with` names.
    """
    teacher = TableRow("Teacher", "teacher", TEACHER)
    values = {row.run: _columns(output, row.run, seeds) for row in (teacher, *ROWS)}
    rows = [_row(output, row, values, seeds, seconds) for row in (teacher, *ROWS)]
    claims = {}
    for claim in CLAIMS:
        mine, its = (values[name][claim.column] for name in (claim.row, claim.than))
        found = compare(mine, its, claim.wants)
        claims[claim.name] = {
            "text": claim.text,
            "column": claim.column,
            "row": claim.row,
            "than": claim.than,
            "holds": found.holds,
            "difference": found.difference,
            "p": found.p,
            "seeds": found.seeds,
        }
    return {"seeds": seeds, "rows": rows, "claims": claims}


def _row(
    output: Path,
    row: TableRow,
    values: Mapping[str, Values],
    seeds: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, found in values[row.run].items():
        columns[name] = {"values": list(found), "mean": mean(found), "spread": stdev(found) if seeds > 1 else None}
        if row.compared_with is not None:
            better = "higher" if _WANTED.get(name) else "lower"
            compared = compare(found, values[row.compared_with][name], better)  # type: ignore[arg-type]
            columns[name] |= {"difference": compared.difference, "p": compared.p}
    if row.run == TEACHER:
        parameters = parameters_of(TEACHER_FOLDER)
        about: dict[str, Any] = {"parameters": parameters, "activated_parameters": parameters, "seconds": None}
    else:
        summary = read_result(output / folder_of(1) / "train" / row.run / "summary.json")
        about = {name: summary[name] for name in ("parameters", "activated_parameters")}
        spent = [sum(seconds[step_name(seed, f"train-{run}")] for run in _chain(row.run)) for seed in _numbers(seeds)]
        about["seconds"] = mean(spent)
    return {
        "group": row.group,
        "name": row.name,
        "run": row.run,
        "compared_with": row.compared_with,
        "bytes_per_position": _bytes(output, row.run),
        **about,
        "columns": columns,
    }


def _columns(output: Path, run: str, seeds: int) -> Values:
    found: Values = {name: [] for name in get_args(Column)}
    for seed in _numbers(seeds):
        answers = output / folder_of(seed) / "answers" / run
        unseen = read_result(answers / "unseen.json")
        for name, values in found.items():
            if name in _SCORES:
                task, metric = _SCORES[name]
                value = read_result(answers / task / "score.json")["metrics"][metric]
            else:
                value = unseen[name]
            values.append(math.nan if value is None else float(value))
    return found


def _bytes(output: Path, run: str) -> float | None:
    """What a run's cache takes a position, with the first seed."""
    cache = next((one.cache for one in RUNS if one.name == run), None)
    if cache is None:
        return None
    totals = read_result(output / folder_of(1) / "caches" / cache / "cache.json")["totals"]
    return float(totals["bytes"] / totals["positions"])


def _chain(run: str) -> list[str]:
    """A run and those that it starts from."""
    parent = next(one.parent for one in RUNS if one.name == run)
    return [run] if parent is None else [run, *_chain(parent)]


def _numbers(seeds: int) -> range:
    return range(1, seeds + 1)
