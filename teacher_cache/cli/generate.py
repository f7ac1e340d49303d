"""`cache-teacher generate` on the command line."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from llavamod_offline.config.command import Arguments, PrintConfig
from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from teacher_cache.generate.run import Generation

_REJECTED_STATUS = 3


def generate(
    arguments: Arguments = None,
    part: Annotated[
        str | None, typer.Option("--slice", metavar="i/n", help="Answer every n-th shard, from the i-th (0-based).")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Continue a set and a cache even if this fingerprint field differs."),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="On SIGTERM, finish the shard in hand if it takes no longer than this."),
    ] = 0.0,
    print_config: PrintConfig = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Let the teacher answer a set's prompts: the answers become a new set, and their records a cache.

    Replaces the last answer of each conversation, given the turns before it (generate.turns=all: every answer).
    Unfinished, empty or invalid answers are listed with the reason in the new set's rejected.jsonl.
    Rerun a killed run to continue; it gives the same set and the same cache. With --slice, several jobs each answer
    a share of the shards; then run the command once without it to make the set of all answers and capture it.

    Exit status: 0 if everything was answered and captured; 3 if something was rejected; 2 for an error; with --grace, 4
    if SIGTERM stopped it and the shard in hand was finished first, and 143 if that would have taken longer.

    \b
    Examples:
      cache-teacher generate data=sets/general teacher=checkpoints/teacher output_set=sets/own output=caches/own
      cache-teacher generate capture.yaml output_set=sets/own generate.max_new_tokens=1024 batch_size=32
      cache-teacher generate data=sets/general teacher=runs/mimic/student output_set=sets/r1 output=caches/r1 \\
        generate.temperature=1 generate.round=1 generate.key_suffix=-r1 generate.capture=false
      cache-teacher generate capture.yaml output_set=sets/sampled generate.temperature=0.7 generate.top_p=0.9 \\
        generate.seed=1 generate.key_suffix=-s1
    """
    from llavamod_offline.config import load_config, split_arguments
    from llavamod_offline.config import print_config as print_settings
    from teacher_cache.config import CacheTeacherConfig

    given = split_arguments([*(arguments or []), *([] if part is None else [f"slice={part}"])])
    if print_config:
        print_settings(CacheTeacherConfig, *given)
        return
    config = load_config(CacheTeacherConfig, *given)
    from teacher_cache.generate.run import generate as run_generation

    done = run_generation(config, allow=allow or [], grace_seconds=grace)
    print(json.dumps(dataclasses.asdict(done))) if as_json else _print(done)
    if done.rejected or (done.capture is not None and not done.capture.all_captured):
        raise typer.Exit(_REJECTED_STATUS)


def _print(done: Generation) -> None:
    if done.written:
        print(
            f"{done.output_set}: wrote {done.tokens:,} tokens for {counted(done.written, 'sample')} in "
            f"{done.seconds:.1f} s "
            f"({done.tokens_per_second:,.0f} tokens/s); {done.retokenised:,} ended by generate.stop, or with a text "
            "that is tokenized differently from what was written"
        )
    if done.digest is None:
        left = f"{counted(done.shards_left, 'shard')} left" if done.shards_left else "every shard is answered"
        print(f"{done.output_set}: {left}; the command without --slice makes the set, and answers what is left")
        return
    kinds = "".join(f", {count} {kind}" for kind, count in done.rejected_by_kind.items())
    print(
        f"{done.output_set}: {counted(done.samples, 'sample')}, {done.rejected} rejected{kinds}, digest {done.digest}"
    )
    if done.rejected:
        print(f"rejected samples and reasons: {done.output_set}/rejected.jsonl")
    cache = done.capture
    if cache is None:
        print(f"to capture it: cache-teacher run data={done.output_set} teacher=TEACHER output=CACHE")
    elif cache.totals:
        print(
            f"{cache.output}: {counted(cache.totals['positions'], 'position')}, {cache.bytes_per_position:.1f} "
            "bytes each, "
            f"{cache.totals['rejected']} rejected, digest {cache.digest}"
        )
