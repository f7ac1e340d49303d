"""The commands of `llavamod-offline` that need no data of yours: toyworld, demo and ladder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def toyworld(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write into.")],
    quick: Annotated[bool, typer.Option("--quick", help="A fraction of the data.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 1,
    benchmark_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images in GQA and in MME; POPE has half as many, Object HalBench three times as many.",
            show_default="as in the demo",
        ),
    ] = None,
) -> None:
    """Render the demo's toy world: samples and benchmarks in LLaVA's file formats, and a small language model.

    \b
    Example:
      llavamod-offline toyworld --output toy
    """
    from llavamod_offline.demo.world import write_world

    for folder in write_world(output, quick=quick, seed=seed, benchmark_images=benchmark_images):
        print(folder)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the demo.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A fraction of the data and steps, as a smoke test.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the toy world's data.")] = 1,
) -> None:
    """Distil a toy teacher into small students, score them all, and write a table and a page.

    Generates a toy world and runs the commands that you would type for your own data and teacher; DIR/commands.sh lists
    them. Takes several minutes on two cores, without network access.

    \b
    Examples:
      llavamod-offline demo
      llavamod-offline demo --quick --output runs/try
    """
    from llavamod_offline.demo.run import run_demo

    run_demo(output, quick=quick, seed=seed)


def ladder(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the ladder.")] = Path(
        "runs/ladder"
    ),
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|M-N",
            help="Number of seeds, each with its own world, or a range such as 4-5 [default: 5; 1 if quick].",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fraction of the data and steps, as a smoke test.")] = False,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1, help="Commands to run at the same time [default: one per core, but at least 2 and at most 8]."
        ),
    ] = None,
) -> None:
    """Show what each stage and each target contributes: some thirty students per seed, and a test of each claim.

    Compares students in the toy world with equal data and steps: with and without teacher, dense and sparse, preference
    losses, alignment terms, and what a cache keeps. Writes DIR/ladder.json and DIR/report.html after each seed.
    Rerun the same command to resume; to add seeds, rerun it with a larger --seeds N. Takes about three hours on two
    cores.

    Seeds can be split across machines: copy each DIR/seed-N/results.json into one DIR and rerun there. A seed with that
    file is complete: its other files may be deleted.

    \b
    Examples:
      llavamod-offline ladder --quick --output runs/try
      llavamod-offline ladder --seeds 8
      llavamod-offline ladder --seeds 4-5
    """
    from llavamod_offline.ladder.run import parse_seeds, run_ladder

    run_ladder(output, seeds=parse_seeds(seeds or ("1" if quick else "5")), quick=quick, at_once=at_once)
