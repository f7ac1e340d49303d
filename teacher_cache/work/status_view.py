"""A capture's status on a terminal."""

from __future__ import annotations

from rich.console import Console

from llavamod_offline.plural import counted
from teacher_cache.inspection.terminal import add_row, make_table, print_pairs, readable_bytes
from teacher_cache.plan.tables import readable_seconds
from teacher_cache.work.status import Status

_WORKERS = 30  # shown at most; live ones come first
_FAILURES = 20


def print_status(console: Console, status: Status) -> None:
    """Print the progress of a capture, its workers and its failures."""
    free = status.shards - status.done - len(status.claimed) - status.failed
    left = f"{len(status.claimed):,} claimed, {status.failed:,} failed, {free:,} free"
    left = "complete" if status.complete else left
    pairs: list[tuple[str, object]] = [
        ("output", status.output),
        ("shards", f"{status.done:,} of {status.shards:,} done ({_share(status.done, status.shards)}); {left}"),
        (
            "content",
            f"{counted(status.positions, 'position')} of {counted(status.sequences, 'sequence')}, "
            f"{status.rejected:,} rejected, {readable_bytes(status.bytes)}",
        ),
    ]
    if status.positions_per_second is not None:
        pairs.append(("speed", f"{status.positions_per_second:,.0f} positions/s"))
    if status.seconds_left is not None:
        pairs.append(("time left", readable_seconds(status.seconds_left)))
    pairs.append(("spent", f"{status.machine_hours:.3g} machine-hours of workers, {status.gpu_hours:.3g} GPU-hours"))
    if status.waiting_share is not None:
        pairs.append(("waiting", f"{status.waiting_share:.1%} of the teachers' time, for images, shards or the disk"))
    if status.planned is not None:
        hours, seconds = status.planned["gpu_hours"], float(status.planned["seconds"] or 0)
        work = readable_seconds(seconds) if hours is None else f"{hours:.3g} GPU-hours"
        size = readable_bytes(float(status.planned["bytes"] or 0))
        pairs.append(("planned", f"{status.planned['positions']:,} positions, {size}, {work}"))
    print_pairs(console, pairs)
    _print_workers(console, status)
    for item in status.failures[:_FAILURES]:
        ending = "given up" if item.given_up else "tried again"
        times = counted(item.attempts, "time")
        console.print(f"shard {item.shard}: failed {times}, {ending}: {item.reason} ({item.host})")
    if len(status.failures) > _FAILURES:
        console.print(f"… and {len(status.failures) - _FAILURES:,} more: see --json")
    if status.failed:
        console.print(f"`cache-teacher retry {status.output}` tries failed shards again")


def _print_workers(console: Console, status: Status) -> None:
    open_ones = sorted((line for line in status.workers if line.state != "ended"), key=lambda line: not line.renewed)
    shown, ended = open_ones[:_WORKERS], len(status.workers) - len(open_ones)
    if shown:
        console.print()
        table = make_table(
            console,
            "Workers",
            [
                ("worker", "left"),
                ("state", "left"),
                ("shards", "right"),
                ("positions/s", "right"),
                ("waiting", "right"),
                ("holds", "left"),
            ],
        )
        for line in shown:
            speed = f"{line.positions_per_second:,.0f}"
            waiting = "" if line.waiting_share is None else f"{line.waiting_share:.1%}"
            add_row(table, line.worker, line.state, line.shards, speed, waiting, ", ".join(line.holds))
        console.print(table)
    if len(open_ones) > len(shown):
        console.print(f"… and {counted(len(open_ones) - len(shown), 'worker')} more: see --json")
    if ended:
        console.print(f"{counted(ended, 'worker')} ended before")


def _share(done: int, total: int) -> str:
    return f"{done / max(total, 1):.1%}"
