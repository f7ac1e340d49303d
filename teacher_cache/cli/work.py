"""`cache-teacher work`, `status` and `retry` on the command line."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavamod_offline.config.command import Arguments, PrintConfig
from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from teacher_cache.work.run import WorkSummary

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Allow = Annotated[
    list[str] | None, typer.Option(metavar="FIELD", help="Continue a cache even if this fingerprint field differs.")
]
Grace = Annotated[
    float, typer.Option(metavar="SECONDS", help="On SIGTERM, finish the shard in hand if it takes no longer than this.")
]
_REJECTED_STATUS = 3
_FAILED_STATUS = 5


def work(
    arguments: Arguments = None,
    lease: Annotated[
        float, typer.Option(metavar="SECONDS", help="Others take over from a worker that is silent for this long.")
    ] = 60.0,
    grace: Grace = 20.0,
    allow: Allow = None,
    max_rejected: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Stop if more than this share of this worker's sequences is rejected."),
    ] = None,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Capture shards of a set beside any number of other workers, on any machines, into one cache.

    Start one for each GPU, with the same settings; workers may come and go at any time. Each claims one shard after
    another in the output itself (a folder, NFS or a bucket) and takes over those of workers that died.
    Clocks may differ. It ends when all shards are in the cache, or have failed capture.attempts times.

    Exit status: 0 if the cache is complete; 3 if it is and some sequences were rejected; 5 if shards have failed
    (`cache-teacher status` lists them, `retry` tries them again); 4 if SIGTERM stopped it and its shard was finished
    first; 143 if SIGTERM stopped it and its shard, if any, was released unfinished; 2 for an error.

    \b
    Examples:
      cache-teacher work capture.yaml                       # on every machine, under a supervisor that restarts it
      cache-teacher work capture.yaml output=s3://bucket/caches/general --grace 100
      srun --ntasks 64 cache-teacher work capture.yaml batch_size=32
      cache-teacher status caches/general --watch
    """
    from llavamod_offline.config import load_config, split_arguments
    from llavamod_offline.config import print_config as print_settings
    from teacher_cache.config import CacheTeacherConfig

    given = [] if max_rejected is None else [f"max_rejected={max_rejected}"]
    files, overrides = split_arguments([*(arguments or []), *given])
    if print_config:
        print_settings(CacheTeacherConfig, files, overrides)
        return
    config = load_config(CacheTeacherConfig, files, overrides)
    from teacher_cache.work.run import work as run_worker

    _end(run_worker(config, allow=allow or [], lease_seconds=lease, grace_seconds=grace), as_json)


def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A cache, finished or not: a folder or URL.")],
    watch: Annotated[bool, typer.Option("--watch", help="Keep printing until the cache is complete.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="The pause of --watch.")] = 30.0,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The plan to compare with, if not the one beside the output.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a capture's progress: shards, who is working on them, failures, speed, bytes, time left and GPU-hours.

    Reads only the output, from any machine. Watches for about 7 seconds (a ninth of the workers' --lease) to see
    which workers are alive.

    \b
    Examples:
      cache-teacher status caches/general
      cache-teacher status s3://bucket/caches/general --watch --every 60
      cache-teacher status caches/general --json
    """
    from teacher_cache.inspection.terminal import make_console
    from teacher_cache.work.status import read_status
    from teacher_cache.work.status_view import print_status

    while True:
        found = read_status(output, plan=plan)
        print(json.dumps(dataclasses.asdict(found)), flush=True) if as_json else print_status(make_console(), found)
        if not watch or found.complete:
            return
        time.sleep(every)


def retry(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The cache: a folder or URL.")],
    arguments: Arguments = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Capture a cache's failed shards and rejected sequences again, and add them to the cache.

    Takes the settings that `work` left in the output, overridden by those given here, such as a smaller batch; for a
    cache that `run` made, all settings must be given. What neither failed nor was rejected is left alone, except that a
    shard in which rejected sequences can now be captured is recaptured as a whole.

    Exit status: 0 if nothing is left; 3 if sequences are still rejected; 5 if shards have failed again, or were never
    begun, which `work` and `run` capture; 2 for an error.

    \b
    Examples:
      cache-teacher retry caches/general
      cache-teacher retry caches/general batch_size=4
      cache-teacher retry caches/general max_length=8192 --allow sequence.max_length
      cache-teacher retry caches/general capture.yaml
    """
    from llavamod_offline.config import split_arguments
    from teacher_cache.work.retry import retry as run_retry
    from teacher_cache.work.retry import retry_config

    done = run_retry(retry_config(output, *split_arguments(arguments or [])), allow=allow or [])
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        captured, shards = len(done.failed_before) - len(done.failed), counted(len(done.failed_before), "failed shard")
        sequences = counted(done.rejected_before, "rejected sequence")
        print(f"{output}: captured {captured} of {shards} and {done.recovered} of {sequences}")
        for name, reason in done.failed.items():
            print(f"failed: shard {name}: {reason}")
        print(f"{done.capture.shards_done} of {done.capture.shards_total} shards are done")
        if done.capture.digest:
            print(f"complete: digest {done.capture.digest}")
    if done.failed or not done.capture.complete:
        raise typer.Exit(_FAILED_STATUS)
    if not done.capture.all_captured:
        raise typer.Exit(_REJECTED_STATUS)


def _end(done: WorkSummary, as_json: bool) -> None:
    """Print what a worker did, and exit with the status that says so."""
    summary = done.capture
    if as_json:
        print(json.dumps({**dataclasses.asdict(summary), "worker": done.worker, "failed": done.failed}))
    else:
        print(
            f"{summary.output}: this worker captured {counted(summary.positions, 'position')} of "
            f"{counted(summary.sequences, 'sequence')} in {summary.seconds:.1f} s, {summary.rejected} rejected"
        )
        for name, reason in done.failed.items():
            print(f"failed: shard {name}: {reason}")
        if summary.totals:
            print(
                f"complete: {summary.totals['positions']:,} positions, {summary.bytes_per_position:.1f} bytes each, "
                f"{summary.totals['rejected']} rejected, digest {summary.digest}"
            )
        else:
            print(f"{summary.shards_done} of {summary.shards_total} shards are done; `cache-teacher retry` tries again")
    if done.failed:
        raise typer.Exit(_FAILED_STATUS)
    if not summary.all_captured:
        raise typer.Exit(_REJECTED_STATUS)
