"""Plans on a terminal, and plans against what became of them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from teacher_cache.inspection.terminal import Justify, add_row, make_table, print_pairs, print_parts, readable_bytes
from teacher_cache.plan.estimate import Comparison, Plan

_COUNTS = ("positions", "sequences", "rejected", "bytes", "bytes a position")
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


def print_plan(console: Console, plan: Plan, kept: Path | None) -> None:
    """Print a plan and where it is kept."""
    probe = plan.probe
    pairs = [
        ("output", plan.output),
        (
            "probe",
            f"{probe['samples']:,} samples captured in {probe['seconds']:.1f} s on {plan.device}, "
            f"{probe['tokenised']:,} tokenised, of {plan.samples:,}",
        ),
        ("positions", f"{plan.positions:,} ± {plan.positions_error:.1%} (standard error)"),
        ("sequences", f"{plan.sequences:,}, and {plan.rejected:,} rejected"),
        ("size", f"{readable_bytes(plan.total_bytes)}, {_per_position(plan.total_bytes, plan.positions)}"),
        ("time", readable_seconds(plan.total_seconds)),
    ]
    if plan.gpu_hours is not None:
        pairs.append(("GPU-hours", f"{plan.gpu_hours:.3g}"))
    if plan.jobs > 1:
        each = readable_seconds(plan.total_seconds / plan.jobs)
        pairs.append(("jobs", f"{plan.jobs:,}, each about {each}; the figures above are of all together"))
    print_pairs(console, pairs)
    console.print()
    table = make_table(console, "Time", [("part", "left"), ("seconds", "right")])
    for name, seconds in plan.seconds.items():
        add_row(table, name, f"{seconds:,.2f}")
    console.print(table)
    console.print()
    positions = max(plan.positions, 1)
    print_parts(console, "Bytes a position", {name: size / positions for name, size in plan.bytes.items()})
    columns: list[tuple[str, Justify]] = [("capture.preset", "left"), ("bytes a position", "right"), ("size", "right")]
    table = make_table(console, "With each preset", columns)
    for name, size in plan.presets.items():
        add_row(table, name, f"{size / positions:,.2f}", readable_bytes(size))
    console.print(table)
    console.print()
    where = f"kept in {kept}" if kept is not None else "not kept: the output is no local folder; name a --file"
    print_pairs(console, [("plan", where)])


def print_comparison(console: Console, fact: Comparison) -> None:
    """Print a finished cache beside its plan."""
    real = _figures(fact.positions, fact.sequences, fact.rejected, fact.bytes)
    planned = _planned_figures(fact.planned)
    if fact.runs_positions >= fact.positions:  # every run was recorded
        real["seconds"] = fact.runs_seconds
        real["GPU-hours"] = fact.runs_seconds / 3600
    columns: list[tuple[str, Justify]] = [
        ("", "left"),
        ("planned", "right"),
        ("real", "right"),
        ("real/planned", "right"),
    ]
    print_pairs(console, [("output", fact.output)])
    console.print()
    table = make_table(console, "Plan against fact", columns)
    for name in (*_COUNTS, "seconds", "GPU-hours", *(f"bytes of {part}" for part in fact.bytes)):
        expected, found = planned.get(name), real.get(name)
        if fact.planned is None or expected is not None or name.startswith("bytes of"):
            ratio = f"{found / expected:.3f}" if found is not None and expected else ""
            add_row(table, name, _number(expected), _number(found), ratio)
    console.print(table)
    for line in _remarks(fact):
        console.print(line)


def _figures(positions: int, sequences: int, rejected: int, parts: dict[str, int]) -> dict[str, float]:
    size = sum(parts.values())
    values = (positions, sequences, rejected, size, size / max(positions, 1))
    return dict(zip(_COUNTS, values, strict=True)) | {f"bytes of {part}": value for part, value in parts.items()}


def _planned_figures(plan: Plan | None) -> dict[str, float]:
    if plan is None:
        return {}
    figures = _figures(plan.positions, plan.sequences, plan.rejected, plan.bytes)
    figures["seconds"] = plan.total_seconds
    return figures if plan.gpu_hours is None else figures | {"GPU-hours": plan.gpu_hours}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def readable_seconds(seconds: float) -> str:
    """Seconds in the largest unit of which there is at least one."""
    for name, unit in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} seconds"


def _per_position(size: int, positions: int) -> str:
    return f"{size / max(positions, 1):.2f} bytes a position all in"


def _remarks(fact: Comparison) -> list[str]:
    if fact.planned is None:
        return ["no plan of it was kept: plan before the run"]
    remarks = [f"planned with other settings: {line}" for line in fact.differences]
    if fact.runs_positions < fact.positions:
        share = fact.runs_positions / max(fact.positions, 1)
        remarks.append(
            f"runs on record: {fact.runs}, of {share:.1%} of the positions in {fact.runs_seconds:,.1f} s; "
            "what a killed run took is not known"
        )
    return remarks
