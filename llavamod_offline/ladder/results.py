"""The ladder's results: every row's columns for every seed, their means and spreads, and the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any, get_args

from llavamod_offline.ladder.claims import compare
from llavamod_offline.ladder.table import CLAIMS, ROWS, TEACHER, Column, TableRow

COLUMNS: dict[str, str] = {
    "accuracy": "accuracy",
    "pope_f1": "POPE F1",
    "response_hallucination": "response hallucination",
    "object_hallucination": "object hallucination",
    "kl": "KL from the teacher",
    "calibration_error": "calibration error",
}
Values = dict[Column, list[float]]

_WANTED = {"accuracy": "higher", "pope_f1": "higher"}  # all others: lower


def summarise(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Make `rows` and `claims` from the results of each seed; what is undefined is None.

    A column is {"values": one per seed, "mean", "spread": their standard deviation}; `difference` and `p` compare it
    with the row that `compared_with` names. `expert_load`: each expert's share of the tokens, layer by layer. Sizes,
    bytes and load are those of the first seed.
    """
    table = (TableRow("Teacher", "teacher", TEACHER), *ROWS)
    values = {row.run: _values([results["runs"][row.run] for results in seeds.values()]) for row in table}
    rows = [_row(row, values, [results["runs"][row.run] for results in seeds.values()]) for row in table]
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
            "verdict": found.verdict,
            "difference": found.difference,
            "p": found.p,
            "seeds": found.seeds,
        }
    return {"seeds": list(seeds), "rows": _defined(rows), "claims": _defined(claims)}


def _defined(value: Any) -> Any:
    """A JSON value with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _defined(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def comparison_text(compared: Mapping[str, Any]) -> str:
    """The `difference` and `p` of a claim or a column; "" without any."""
    if compared.get("difference") is None:
        return ""
    return f"{difference_text(compared['difference'])}, p = {compared['p']:.3f}"


def difference_text(difference: float) -> str:
    """A difference with its sign, to four decimals, or in powers of ten if those would be zeros."""
    return f"{difference:+.1e}" if 0 < abs(difference) < 5e-4 else f"{difference:+z.4f}"


def _values(runs: list[Mapping[str, Any]]) -> Values:
    found: Values = {}
    for name in get_args(Column):
        given = [run["columns"][name] for run in runs]
        found[name] = [math.nan if value is None else value for value in given]
    return found


def _row(row: TableRow, values: Mapping[str, Values], runs: list[Mapping[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, found in values[row.run].items():
        spread = stdev(found) if len(found) > 1 and not any(map(math.isnan, found)) else None
        columns[name] = {"values": found, "mean": mean(found), "spread": spread}
        if row.compared_with is not None:
            better = "higher" if _WANTED.get(name) else "lower"
            compared = compare(found, values[row.compared_with][name], better)  # type: ignore[arg-type]
            columns[name] |= {"difference": compared.difference, "p": compared.p}
    first, *_ = runs
    about = {name: first[name] for name in ("parameters", "activated_parameters", "bytes_per_position", "expert_load")}
    spent = [run["seconds"] for run in runs if run["seconds"] is not None]
    return {
        "group": row.group,
        "name": row.name,
        "run": row.run,
        "compared_with": row.compared_with,
        **about,
        "seconds": mean(spent) if spent else None,
        "columns": columns,
    }
