"""Audits on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from llavamod_offline.plural import counted
from teacher_cache.audit.record_diff import RecordDifference
from teacher_cache.audit.run import Audit
from teacher_cache.inspection.terminal import Justify, add_row, make_table, print_pairs


def print_audit(console: Console, audit: Audit) -> None:
    """Print an audit: a table for each role, then the verdict."""
    limits = audit.limits
    print_pairs(
        console,
        [
            ("cache", f"{audit.cache} ({audit.precision} precision)"),
            ("captured by", _engine(audit.captured_with)),
            ("audited by", _engine(audit.engine)),
            ("limits", f"beyond the encoding's error: {limits.largest:g} at most, {limits.mean:g} on average"),
            ("", f"equal most likely ids at {limits.agreement:.1%} of the positions or more"),
        ],
    )
    console.print()
    names: list[tuple[str, Justify]] = [("", "left"), ("", "left")]
    columns: list[tuple[str, Justify]] = [*names, ("max", "right"), ("mean", "right"), ("99 %", "right")]
    for role in audit.agreement:
        title = f"{role.role}: {counted(role.sequences, 'sequence')}, {counted(role.positions, 'position')}"
        table = make_table(console, title, columns)
        for figure in audit.figures:
            if figure.role != role.role:
                continue
            rows = (
                ("cache − teacher", figure.cache),
                ("teacher − teacher, other batches", figure.control),
                ("encoding's largest error", figure.allowed),
                ("beyond it", figure.beyond),
            )
            for number, (name, measured) in enumerate(rows):
                add_row(table, figure.figure if not number else "", name, *_numbers(measured))
        console.print(table)
        console.print(f"equal most likely ids: cache {role.cache:.3%}, teacher in other batches {role.control:.3%}")
        console.print()
    exceeded = counted(len(audit.failures), "limit")
    for note in audit.notes:
        console.print(note)
    for failure in audit.failures:
        console.print(Text(failure, "red"))
    console.print(
        Text(
            "the cache equals the teacher within the limits" if audit.ok else f"DIFFERENT: {exceeded} exceeded", "bold"
        )
    )


def _numbers(measured: RecordDifference) -> tuple[str, str, str]:
    if not measured.count:
        return ("–", "–", "–")
    return f"{measured.max:.2e}", f"{measured.mean:.2e}", f"{measured.p99:.2e}"


def _engine(engine: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in engine.items() if name in ("name", "dtype", "vllm", "torch"))
