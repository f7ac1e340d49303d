"""The command `cache-teacher`: run a teacher once and cache its distributions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavamod_offline.config.command import Arguments, Commands, PrintConfig, settings_command
from llavamod_offline.entrypoint import run_command
from llavamod_offline.plural import counted
from teacher_cache.cli.audit_report import audit, report
from teacher_cache.cli.generate import generate
from teacher_cache.cli.work import Grace, retry, status, work

if TYPE_CHECKING:
    from teacher_cache.capture.summary import Summary
    from teacher_cache.config import CacheTeacherConfig


def _schema() -> type[CacheTeacherConfig]:
    from teacher_cache.config import CacheTeacherConfig

    return CacheTeacherConfig


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Run a teacher once and cache its distributions for any number of students.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
CacheFolder = Annotated[str, typer.Argument(metavar="CACHE", help="A cache: a folder, or a URL such as s3://….")]
_SettingsCommand = settings_command(_schema)
_DAMAGED_STATUS = 1
_REJECTED_STATUS = 3


@app.command(cls=_SettingsCommand)
def run(
    arguments: Arguments = None,
    part: Annotated[
        str | None, typer.Option("--slice", metavar="i/n", help="Capture every n-th shard, from the i-th (0-based).")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Continue a cache even if this fingerprint field differs."),
    ] = None,
    max_rejected: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Stop if more than this share of sequences is rejected.")
    ] = None,
    grace: Grace = 0.0,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Capture a packed set into a cache. A rerun captures only what is missing.

    Exit status: 0 if every sequence was captured; 3 if some were rejected (rejected.jsonl lists keys and reasons);
    2 for an error, including more rejections than --max-rejected; with --grace, 4 if SIGTERM stopped it and the shard
    in hand was finished first, and 143 if that would have taken longer.

    \b
    Examples:
      cache-teacher run data=sets/captions teacher=checkpoints/teacher output=caches/captions
      cache-teacher run capture.yaml capture.preset=compact batch_size=8
      cache-teacher run data=sets/pairs teacher=checkpoints/teacher output=caches/pairs \\
        capture.preset=reference capture.mismatched=true     # for preference training, including unpaired KTO
      cache-teacher run capture.yaml --slice 3/16        # one of 16 jobs that share the output
      cache-teacher run capture.yaml engine.ray=true     # a worker on each GPU
      cache-teacher run capture.yaml --max-rejected 0.01 || [ $? -eq 3 ]   # in a script that stops on errors

    """
    from llavamod_offline.config import load_config, split_arguments
    from llavamod_offline.config import print_config as print_settings
    from teacher_cache.config import CacheTeacherConfig

    options = {"slice": part, "max_rejected": max_rejected}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    files, overrides = split_arguments([*(arguments or []), *given])
    if print_config:
        print_settings(CacheTeacherConfig, files, overrides)
        return
    config = load_config(CacheTeacherConfig, files, overrides)
    from teacher_cache.capture.run import run_capture
    from teacher_cache.plan.estimate import plan_file, record_run

    summary = run_capture(config, allow=allow or [], grace_seconds=grace)
    record_run(plan_file(config.output), summary)
    print(json.dumps(dataclasses.asdict(summary))) if as_json else _print_summary(summary)
    if not summary.all_captured:
        raise typer.Exit(_REJECTED_STATUS)


def _print_summary(summary: Summary) -> None:
    if summary.sequences or summary.rejected:
        print(
            f"{summary.output}: captured {counted(summary.positions, 'position')} of "
            f"{counted(summary.sequences, 'sequence')} in {summary.seconds:.1f} s "
            f"({summary.positions_per_second:,.0f} positions/s), {summary.rejected} rejected"
        )
    else:
        print(f"{summary.output}: nothing to do")
    for reason in summary.reasons:
        more = ", …" if reason.count > len(reason.keys) else ""
        print(f"rejected {reason.count:,}: {reason.kind} ({', '.join(reason.keys)}{more})")
    if not summary.all_captured:
        where = "rejected.jsonl" if summary.complete else "shards/*/rejected.jsonl"
        print(f"rejected sequences and reasons: {summary.output}/{where}")
    if not summary.complete:
        print(f"{summary.shards_done} of {summary.shards_total} shards are done: run the other slices to finish")
    elif summary.totals:
        print(
            f"complete: {summary.totals['positions']:,} positions, {summary.bytes_per_position:.1f} bytes each, "
            f"{summary.totals['rejected']} rejected, digest {summary.digest}"
        )


@app.command(cls=_SettingsCommand)
def plan(
    arguments: Arguments = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Capture at most N samples, evenly spaced.")] = 256,
    seconds: Annotated[float, typer.Option(metavar="T", min=0, help="Stop the probe after about T seconds.")] = 60.0,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help="Save the plan in FILE instead of .NAME.plan.jsonl next to the output."
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="N,…", help="Also say what these numbers of samples need, such as 5e6,1e9.")
    ] = None,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Estimate size and time of a run, or compare a finished one with its plan.

    The estimate comes from a short probe of the real teacher on evenly spaced samples.

    \b
    Examples:
      cache-teacher plan data=sets/captions teacher=checkpoints/teacher output=caches/captions
      cache-teacher plan capture.yaml capture.top_k=24 --samples 64 --seconds 20
      cache-teacher run capture.yaml && cache-teacher plan capture.yaml
      cache-teacher plan capture.yaml --scale 5e6,1e9      # files, requests, hours, opening time, a training's memory

    The plan is kept beside the output; runs append their time. Nothing is written into the output itself.
    """
    from llavamod_offline.config import load_config, split_arguments
    from llavamod_offline.config import print_config as print_settings
    from teacher_cache.config import CacheTeacherConfig

    given = split_arguments(arguments or [])
    if print_config:
        print_settings(CacheTeacherConfig, *given)
        return
    config = load_config(CacheTeacherConfig, *given)
    from teacher_cache.fingerprint import without_tokens
    from teacher_cache.inspection.terminal import make_console
    from teacher_cache.plan import estimate as planning
    from teacher_cache.plan import tables as view
    from teacher_cache.plan.scale import parse_scale, scaled

    kept = file or planning.plan_file(config.output)
    numbers = parse_scale(scale) if scale else []
    finished = planning.finished_cache(config.output)
    if finished is not None and not numbers:
        fact = planning.compare(config.output, finished, kept)
        print(json.dumps(dataclasses.asdict(fact))) if as_json else view.print_comparison(make_console(), fact)
        return
    made = planning.make_plan(config, samples=samples, seconds=seconds)
    shown = {**dataclasses.asdict(made), "fingerprint": without_tokens(made.fingerprint)}
    larger = scaled(made, numbers)
    if as_json:
        print(json.dumps({**shown, **({"scale": [dataclasses.asdict(item) for item in larger]} if larger else {})}))
    else:
        view.print_plan(make_console(), made, kept)
        if larger:
            view.print_scaled(make_console(), larger)
    if kept is not None and finished is None:  # after printing: a file that cannot be written loses no estimate
        planning.write_plan(kept, made)


@app.command()
def verify(
    cache: CacheFolder,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged shards, so that `run` captures only those again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute every checksum, decode all records and list any damage (exit status 1).

    \b
    Examples:
      cache-teacher verify caches/captions
      cache-teacher verify s3://bucket/captions --json
      cache-teacher verify caches/captions --repair && cache-teacher run capture.yaml

    Only --repair changes anything, and lists what it removes; it refuses a cache that a run is writing.
    """
    if repair:
        from teacher_cache.verify.repair import repair_cache, repair_lines

        done = repair_cache(cache)
        print(json.dumps(dataclasses.asdict(done)) if as_json else "\n".join(repair_lines(cache, done)))
        return
    from teacher_cache.verify.cache import verify_cache

    verdict = verify_cache(cache)
    if as_json:
        print(json.dumps(dataclasses.asdict(verdict)))
    else:
        for problem in verdict.damage:
            print(problem)
        state = "intact" if verdict.ok else f"DAMAGED in {counted(len(verdict.damage), 'place')}"
        print(
            f"{cache}: {state}: {counted(verdict.shards, 'shard')}, {counted(verdict.sequences, 'sequence')}, "
            f"{counted(verdict.positions, 'position')}, digest {verdict.digest}"
        )
        if not verdict.ok:
            print(f"`cache-teacher verify {cache} --repair` removes the damage, and says how to fill the gap")
    if not verdict.ok:
        raise typer.Exit(_DAMAGED_STATUS)


@app.command()
def inspect(
    cache: CacheFolder,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A sample's key.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A checkpoint folder whose tokenizer labels the ids.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a cache, or each token of a sample.

    With a key: each supervised token with the teacher's alternatives, the mass of the tail, and the tail samples.

    \b
    Examples:
      cache-teacher inspect caches/captions
      cache-teacher inspect caches/captions scene-000012 --tokenizer checkpoints/teacher
    """
    from teacher_cache.inspection import terminal
    from teacher_cache.inspection.summary import describe_cache, describe_key
    from teacher_cache.inspection.token_labels import TokenNames
    from teacher_cache.read.reader import open_cache

    opened = open_cache(cache)
    about = describe_cache(opened) if key is None else describe_key(opened, key, TokenNames(tokenizer).label)
    if as_json:
        print(json.dumps(about, ensure_ascii=False))
    elif isinstance(about, dict):
        terminal.print_cache(terminal.make_console(), about)
    else:
        terminal.print_sequences(terminal.make_console(), about)


@app.command()
def export(
    cache: CacheFolder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.parquet", help="The file to write.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="table, axolotl (for its KD trainer) or trl (reference log-probs)."
        ),
    ] = "table",
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Keep only the K most likely ids of each position.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="SET", help="The packed set, for the prompts (axolotl).")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A checkpoint folder with the teacher's tokenizer (axolotl).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write top-k ids and reference log-probs as parquet, and list what the layout cannot hold.

    One row per sequence: `table` for any reader, `axolotl` for its knowledge-distillation trainer; one row per pair:
    `trl` for its DPO trainer.

    \b
    Examples:
      cache-teacher export caches/captions --output captions.parquet
      cache-teacher export caches/captions --output captions.parquet --top-k 16 --json
      cache-teacher export caches/texts --format axolotl --data sets/texts \\
        --tokenizer checkpoints/teacher --output texts.parquet
      cache-teacher export caches/preference --format trl --output reference.parquet
    """
    from teacher_cache.inspection.export import export_cache
    from teacher_cache.read.reader import open_cache

    done = export_cache(open_cache(cache), output, layout=layout, top_k=top_k, data=data, tokenizer=tokenizer)
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    if layout == "trl":
        left = f"; {counted(done.incomplete, 'pair')} left out, of which one response was rejected"
        print(
            f"{output}: reference log-probs of {done.sequences // 2:,} pairs, {done.bytes:,} bytes"
            f"{left if done.incomplete else ''}"
        )
        return
    print(f"{output}: {done.positions:,} positions of {done.sequences:,} sequences, {done.bytes:,} bytes")
    images = f"; {done.with_images:,} sequences with images left out" if done.with_images else ""
    print(f"not in this layout: {', '.join(done.lost)}; its ids hold {done.mass:.4f} of the mass on average{images}")


@app.command()
def merge(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE...", help="Finished caches over different data.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="CACHE", help="The cache to write.")],
    allow: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Merge even if this fingerprint field differs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge caches over different data into one.

    Shards are copied unchanged. Caches with different settings are refused.

    \b
    Examples:
      cache-teacher merge caches/general caches/documents --output caches/all
      cache-teacher merge caches/a caches/b --output caches/all --allow engine.torch
    """
    from teacher_cache.read.reader import open_cache
    from teacher_cache.write.merge import merge_caches

    done = merge_caches([open_cache(cache) for cache in caches], output, allow=allow or [])
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    for before, now in done.renamed.items():
        print(f"renamed {before} to {now}: the name was already used")
    print(
        f"{output}: {counted(done.positions, 'position')} of {counted(done.sequences, 'sequence')} in "
        f"{counted(done.shards, 'shard')} of {done.caches} caches, digest {done.digest}"
    )


app.command(cls=_SettingsCommand)(work)
app.command()(status)
app.command(cls=_SettingsCommand)(retry)
app.command(cls=_SettingsCommand)(generate)
app.command()(report)
app.command(cls=_SettingsCommand)(audit)


def main() -> None:
    """Run `cache-teacher`."""
    run_command(app)
