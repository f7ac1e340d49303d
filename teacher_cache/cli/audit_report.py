"""The commands `cache-teacher report` and `cache-teacher audit`, which examine a finished cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from llavamod_offline.config.command import Arguments
from llavamod_offline.plural import counted

_DIFFERENT_STATUS = 1
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_Cache = Annotated[str, typer.Argument(metavar="CACHE", help="A cache: a folder, or a URL such as s3://….")]


def report(
    cache: _Cache,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SET", help="A captured packed set, by path or URL; repeat for several."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A checkpoint folder whose tokenizer labels the ids.")
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Show N evenly spaced samples besides the most unusual ones.")
    ] = 24,
    positions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Compute the distributions from at most about N positions.")
    ] = 1_000_000,
    as_json: _Json = False,
) -> None:
    """Write an HTML page about a cache: figures by source, the most unusual sequences, samples token by token.

    The page is self-contained, images included (large ones shrunk). Hover over a token, tap it or move to it with the
    arrow keys to see the teacher's alternatives.

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
        f"{output}: {done.bytes:,} bytes, {counted(done.samples, 'sample')}; distributions over {some} "
        f"{counted(done.of_positions, 'position')}"
    )


def audit(
    cache: _Cache,
    arguments: Arguments = None,
    sequences: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Compare N random sequences.")] = 64,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed that selects the sequences.")] = 0,
    largest: Annotated[
        float | None, typer.Option("--max", metavar="D", min=0, help="Largest difference that passes.")
    ] = None,
    mean: Annotated[
        float | None, typer.Option("--mean", metavar="D", min=0, help="Largest mean difference that passes.")
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            "--agreement", metavar="S", min=0, max=1, help="Smallest share of equal most likely ids that passes."
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Continue even if this fingerprint field, or section, differs."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Rerun the teacher on random sequences and compare with the cache (exit status 1 if they differ).

    Also prints how the teacher differs from itself in batches of a different shape, and the largest error of the
    cache's encoding. `--max` and `--mean` limit the differences beyond that error.

    \b
    Examples:
      cache-teacher audit caches/captions data=sets/captions teacher=checkpoints/teacher
      cache-teacher audit caches/captions capture.yaml engine.kind=vllm    # captured by one engine, checked by another
      cache-teacher audit caches/captions capture.yaml --n 256 --max 1e-4 --json

    Records are made with the cache's own settings; capture.* is ignored. The default limits depend on the coarser of
    the two data types: float32 0.001 (mean 0.0001, agreement 0.995), float16 0.25 (0.02, 0.98),
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
        raise typer.Exit(_DIFFERENT_STATUS)
