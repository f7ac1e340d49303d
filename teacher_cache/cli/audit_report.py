"""The commands of `cache-teacher` that judge a finished cache: `report` and `audit`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

_UNLIKE_STATUS = 1
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_Cache = Annotated[str, typer.Argument(metavar="CACHE", help="A cache: a folder, or a URL such as s3://….")]


def report(
    cache: _Cache,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SET", help="A packed set it was captured from, as often as it has sets; or their URLs."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A checkpoint folder whose tokenizer names the ids.")
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Show N evenly spaced samples besides the strangest.")
    ] = 24,
    positions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Take the distributions over about N positions at most.")
    ] = 1_000_000,
    as_json: _Json = False,
) -> None:
    """Show a cache as one HTML page: figures by source, the strangest sequences, samples token by token.

    The page holds all it needs, images too (large ones shrunk). Hover over a token, tap it or go to it with the
    arrow keys to see what else the teacher thought of.

    \b
    Examples:
      cache-teacher report caches/captions -o captions.html
      cache-teacher report caches/captions --data sets/captions --tokenizer checkpoints/teacher -o captions.html
      cache-teacher report s3://bucket/all --data sets/general --data sets/documents --samples 60 -o all.html
    """
    from teacher_cache.read.reader import open_cache
    from teacher_cache.report.page import write_report

    done = write_report(
        open_cache(cache), output, data=data or [], tokenizer=tokenizer, samples=samples, positions=positions
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    some = "all" if done.positions == done.of_positions else f"{done.positions:,} of"
    print(
        f"{output}: {done.bytes:,} bytes, {done.samples:,} samples; distributions over {some} "
        f"{done.of_positions:,} positions"
    )


def audit(
    cache: _Cache,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [key=value]...", help="Settings, as those of `run`.")
    ] = None,
    sequences: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Compare N random sequences.")] = 64,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Which ones are drawn.")] = 0,
    largest: Annotated[
        float | None, typer.Option("--max", metavar="D", min=0, help="Largest difference that passes.")
    ] = None,
    mean: Annotated[float | None, typer.Option("--mean", metavar="D", min=0, help="Mean that passes.")] = None,
    agreement: Annotated[
        float | None, typer.Option("--agreement", metavar="S", min=0, max=1, help="Share of equal first choices.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Go on although this fingerprint field, or section, differs."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Run the teacher again over random sequences and compare with the cache (exit status 1 if they are unlike).

    Beside the differences of cache and teacher stand those of the teacher with itself in batches of another shape, and
    the error that the cache's encoding is allowed. `--max` and `--mean` are what may remain beyond that error.

    \b
    Examples:
      cache-teacher audit caches/captions data=sets/captions teacher=checkpoints/teacher
      cache-teacher audit caches/captions capture.yaml engine.kind=vllm    # made by one engine, judged by another
      cache-teacher audit caches/captions capture.yaml --n 256 --max 1e-4 --json

    What is kept of a distribution comes from the cache, whatever capture.* says. Without options the limits follow
    from the coarser number type of both: float32 0.001 (mean 0.0001, agreement 0.995), float16 0.25 (0.02, 0.98),
    bfloat16 1.5 (0.1, 0.9).
    """
    from llavamod_offline.config import load_config, split_arguments
    from teacher_cache.config import CacheTeacherConfig

    files, overrides = split_arguments(arguments or [])
    config = load_config(CacheTeacherConfig, files, [*overrides, f"output={cache}"])
    from teacher_cache.audit import tables as audit_tables
    from teacher_cache.audit.run import audit_cache
    from teacher_cache.inspection.terminal import make_console
    from teacher_cache.read.reader import open_cache

    done = audit_cache(
        open_cache(cache),
        config,
        sequences=sequences,
        seed=seed,
        largest=largest,
        mean=mean,
        agreement=agreement,
        allow=allow or [],
    )
    print(json.dumps(dataclasses.asdict(done))) if as_json else audit_tables.print_audit(make_console(), done)
    if not done.ok:
        raise typer.Exit(_UNLIKE_STATUS)
