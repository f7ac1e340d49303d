"""The command `cache-teacher`: run the teacher once and keep what it says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llavamod_offline.command import run_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Run a teacher once, keep what it says.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
CacheFolder = Annotated[Path, typer.Argument(metavar="CACHE", help="A cache folder.")]
_DAMAGED_STATUS = 1


@app.command()
def run(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [key=value]...", help="Settings; later ones win.")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--slice", metavar="i/n", help="Capture every n-th shard, from the i-th (0-based).")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Go on with a cache although this fingerprint field differs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Capture a packed set into a cache; started again, it does only what is missing.

    \b
    Examples:
      cache-teacher run data=sets/captions teacher=checkpoints/teacher output=caches/captions
      cache-teacher run capture.yaml batch_size=8 capture.head_max=24
      cache-teacher run capture.yaml --slice 3/16        # one of 16 jobs that share the output

    \b
    Settings (`cache-teacher settings` lists them with their defaults): data, teacher, output, template,
    image_aspect, max_length, batch_size, dtype, device, workers, slice, capture.{head_mass, head_max,
    draws_max, draws_per_mass, temperatures, forced_tokens, log_probs, positions, seed}.
    """
    from llavamod_offline.config import load_config, split_arguments
    from teacher_cache.config import CacheConfig

    files, overrides = split_arguments([*(arguments or []), *([f"slice={part}"] if part else [])])
    config = load_config(CacheConfig, files, overrides)
    from teacher_cache.job import run_job

    summary = run_job(config, allow=allow or [])
    if as_json:
        print(json.dumps(dataclasses.asdict(summary)))
        return
    if summary.sequences or summary.rejected:
        print(
            f"{summary.output}: captured {summary.positions:,} positions of {summary.sequences:,} sequences in "
            f"{summary.seconds:.1f} s ({summary.positions_per_second:,.0f} positions/s), {summary.rejected} rejected"
        )
    else:
        print(f"{summary.output}: nothing to do")
    if summary.rejected:
        where = "rejected.jsonl" if summary.complete else "shards/*/rejected.jsonl"
        print(f"the rejected sequences and the reasons are in {summary.output}/{where}")
    if not summary.complete:
        print(f"{summary.shards_done} of {summary.shards_total} shards are there: run the other slices to finish")
    elif summary.totals:
        print(
            f"complete: {summary.totals['positions']:,} positions, {summary.bytes_per_position:.1f} bytes each all in, "
            f"{summary.totals['rejected']} rejected, digest {summary.digest}"
        )


@app.command()
def settings() -> None:
    """List the settings of `run` with their types and defaults.

    \b
    Example:
      cache-teacher settings
    """
    from llavamod_offline.config import describe_config
    from teacher_cache.config import CacheConfig

    print(describe_config(CacheConfig))


@app.command()
def verify(cache: CacheFolder, as_json: AsJson = False) -> None:
    """Recompute every checksum, decode everything and name any damage (exit status 1).

    \b
    Examples:
      cache-teacher verify caches/captions
      cache-teacher verify caches/captions --json
    """
    from teacher_cache.verify import verify_cache

    verdict = verify_cache(cache)
    if as_json:
        print(json.dumps(dataclasses.asdict(verdict)))
    else:
        for problem in verdict.damage:
            print(problem)
        state = "sound" if verdict.ok else f"DAMAGED ({len(verdict.damage)} findings)"
        print(
            f"{cache}: {state}: {verdict.shards} shards, {verdict.sequences:,} sequences, "
            f"{verdict.positions:,} positions, digest {verdict.digest}"
        )
    if not verdict.ok:
        raise typer.Exit(_DAMAGED_STATUS)


@app.command()
def inspect(
    cache: CacheFolder,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A sample's key.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A checkpoint folder whose tokenizer names the ids.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a cache holds; for a key, each supervised token with the teacher's alternatives.

    \b
    Examples:
      cache-teacher inspect caches/captions
      cache-teacher inspect caches/captions scene-000012 --tokenizer checkpoints/teacher
    """
    from teacher_cache import inspection
    from teacher_cache.reader import open_cache

    opened = open_cache(cache)
    if key is None:
        about = inspection.describe_cache(opened)
        print(json.dumps(about, ensure_ascii=False) if as_json else "\n".join(inspection.cache_lines(opened)))
        return
    sequences = inspection.describe_key(opened, key, _id_names(tokenizer))
    print(json.dumps(sequences, ensure_ascii=False) if as_json else "\n".join(inspection.key_lines(sequences)))


def _id_names(folder: Path | None) -> Callable[[int], str]:
    if folder is None:
        return lambda number: f"#{number}"
    from llavamod_offline.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda number: repr(tokenizer.decode([number]))


def main() -> None:
    """Run the command."""
    run_command(app)
