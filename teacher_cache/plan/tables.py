"""Plans, and their comparison with finished caches, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from teacher_cache.inspection.terminal import Justify, add_row, make_table, print_pairs, print_parts, readable_bytes
from teacher_cache.plan.estimate import Comparison, Plan
from teacher_cache.plan.scale import ScaledPlan

_COUNTS = ("positions", "sequences", "rejected", "bytes", "bytes per position")
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))


def print_plan(console: Console, plan: Plan, kept: Path | None) -> None:
    """Print a plan and where it is saved."""
    probe = plan.probe
    pairs = [
        ("output", plan.output),
        (
            "probe",
            f"{probe['samples']:,} of {plan.samples:,} samples captured in {probe['seconds']:.1f} s on {plan.device}",
        ),
        ("positions", f"{plan.positions:,} ± {plan.positions_error:.1%} (standard error)"),
        ("sequences", f"{plan.sequences:,}, plus {plan.rejected:,} rejected"),
        ("size", f"{readable_bytes(plan.total_bytes)}, {_per_position(plan.total_bytes, plan.positions)}"),
        ("time", readable_seconds(plan.total_seconds)),
    ]
    if plan.gpu_hours is not None:
        pairs.append(("GPU-hours", f"{plan.gpu_hours:.3g}"))
    if plan.jobs > 1:
        each = readable_seconds(plan.total_seconds / plan.jobs)
        pairs.append(("jobs", f"{plan.jobs:,}, about {each} each; the figures above are totals"))
    print_pairs(console, pairs)
    console.print()
    table = make_table(console, "Time", [("part", "left"), ("seconds", "right")])
    for name, seconds in plan.seconds.items():
        add_row(table, name, f"{seconds:,.2f}")
    console.print(table)
    console.print()
    positions = max(plan.positions, 1)
    print_parts(console, "Bytes per position", {name: size / positions for name, size in plan.bytes.items()})
    columns: list[tuple[str, Justify]] = [
        ("capture.preset", "left"),
        ("bytes per position", "right"),
        ("size", "right"),
    ]
    table = make_table(console, "With each preset", columns)
    for name, size in plan.presets.items():
        add_row(table, name, f"{size / positions:,.2f}", readable_bytes(size))
    console.print(table)
    console.print()
    where = f"saved in {kept}" if kept is not None else "not saved, since the output is a URL: pass --file"
    print_pairs(console, [("plan", where)])


def print_scaled(console: Console, scaled: Sequence[ScaledPlan]) -> None:
    """Print what larger captures take, a column each."""
    console.print()
    columns: list[tuple[str, Justify]] = [("samples", "left"), *((f"{item.samples:,}", "right") for item in scaled)]
    table = make_table(console, "At scale", columns)
    for name, show in _SCALED.items():
        values = [getattr(item, name) for item in scaled]
        if any(value is not None for value in values):
            add_row(table, name.replace("_", " "), *map(show, values))
    console.print(table)


def print_comparison(console: Console, done: Comparison) -> None:
    """Print a finished cache next to its plan."""
    actual = _figures(done.positions, done.sequences, done.rejected, done.bytes)
    planned = _planned_figures(done.planned)
    if done.runs_positions >= done.positions:  # every run was recorded
        actual["seconds"] = done.runs_seconds
        actual["GPU-hours"] = done.runs_seconds / 3600 * (done.planned.gpus if done.planned else 1.0)
    columns: list[tuple[str, Justify]] = [
        ("", "left"),
        ("planned", "right"),
        ("actual", "right"),
        ("actual/planned", "right"),
    ]
    print_pairs(console, [("output", done.output)])
    console.print()
    table = make_table(console, "Plan and result", columns)
    for name in (*_COUNTS, "seconds", "GPU-hours", *(f"bytes of {part}" for part in done.bytes)):
        expected, found = planned.get(name), actual.get(name)
        if done.planned is None or expected is not None or name.startswith("bytes of"):
            ratio = f"{found / expected:.3f}" if found is not None and expected else ""
            add_row(table, name, _number(expected), _number(found), ratio)
    console.print(table)
    for line in _remarks(done):
        console.print(line)


def _count(value: float) -> str:
    return f"{value:,}"


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
    """Seconds in the largest unit that gives at least 1."""
    for name, unit in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} seconds"


_SCALED: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("shards", "sequences", "positions", "files", "write_requests"), _count),
    **dict.fromkeys(("bytes", "index_bytes", "table_bytes"), readable_bytes),
    "machine_hours": lambda hours: f"{hours:,.4g}",
    "gpu_hours": lambda hours: f"{hours:,.4g}",
    **dict.fromkeys(("open_seconds", "join_seconds"), readable_seconds),
    **dict.fromkeys(("open_memory", "training_memory", "training_disk"), readable_bytes),
}


def _per_position(size: int, positions: int) -> str:
    return f"{size / max(positions, 1):.2f} bytes per position in total"


def _remarks(done: Comparison) -> list[str]:
    if done.planned is None:
        return ["no saved plan: run `cache-teacher plan` before the capture"]
    remarks = [f"planned with other settings: {line}" for line in done.differences]
    if done.runs_positions < done.positions:
        share = done.runs_positions / max(done.positions, 1)
        remarks.append(
            f"recorded runs: {done.runs}, with {share:.1%} of the positions in {done.runs_seconds:,.1f} s; "
            "killed runs are not recorded"
        )
    return remarks
