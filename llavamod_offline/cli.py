"""`llavamod-offline`: sets of samples, made from the files that people have."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from llavamod_offline.command import run_command

if TYPE_CHECKING:
    from llavamod_offline.data.pack import PackSummary

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)


class Keys(StrEnum):
    """Where the samples' keys come from."""

    ID = "id"
    ROW = "row"


@app.callback()
def _commands() -> None:
    """Make sets of samples for capture, training and evaluation."""


@app.command()
def pack(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="LLaVA .json or .jsonl, or RLAIF-V .parquet files.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The set folder to make.")],
    images: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder that images are found in; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the shards; the folder's name if not given.")] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples a shard holds at most.")] = 1000,
    keys: Annotated[Keys, typer.Option(help="Sample keys: the rows' ids, or file name and row number.")] = Keys.ID,
    max_rejected: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of rejected rows above which nothing is packed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Pack conversations or preferences and their images into a set: WebDataset shards with an index.

    Rows that cannot be used are listed with their reason in the set's rejected.jsonl, and counted; the rest is packed.

    \b
    Examples:
      llavamod-offline pack llava_v1_5_mix665k.json --images data/llava --keys row --output sets/general
      llavamod-offline pack captions.json chat.jsonl --images coco --images own --output sets/mixed
      llavamod-offline pack RLAIF-V-Dataset_*.parquet --output sets/preference --max-rejected 0.01
    """
    from tqdm import tqdm

    from llavamod_offline.data.pack import write_set
    from llavamod_offline.data.sources import read_sources

    total = sum(source.stat().st_size for source in sources if source.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="pack", disable=not sys.stderr.isatty()) as bar:
        rows = read_sources(sources, images=images or (), keys=keys.value, advance=bar.update)
        hint = "number the rows with --keys row" if keys is Keys.ID else "rename one of the files"
        summary = write_set(
            rows,
            output,
            name=name,
            shard_samples=shard_samples,
            overwrite=overwrite,
            max_rejected=max_rejected,
            duplicate_hint=hint,
        )
    print(json.dumps(summary.to_json(), ensure_ascii=False) if as_json else _render(summary))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make, or to make anew.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the data and the steps: does it run?")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the toy world's data.")] = 1,
) -> None:
    """Distil a toy teacher into small students, score them all, and write a table and a page.

    Draws a toy world and runs the same commands on it that you would type for your own data and teacher; they are
    written to DIR/commands.sh. Takes a few minutes on two cores. Needs no network.

    \b
    Examples:
      llavamod-offline demo
      llavamod-offline demo --quick --output runs/try
    """
    from llavamod_offline.demo.run import run_demo

    run_demo(output, quick=quick, seed=seed)


def _render(summary: PackSummary) -> str:
    lines = [
        f"packed {summary.samples} sample(s) ({summary.conversations} conversation(s), {summary.preferences} "
        f"preference(s), {summary.images} image(s)) into {summary.path}: {summary.shards} shard(s), "
        f"{summary.bytes / 1e6:.1f} MB"
    ]
    if summary.rejected:
        rows = summary.samples + summary.rejected
        lines.append(f"rejected {summary.rejected} of {rows} rows, listed in {summary.path / 'rejected.jsonl'}:")
        lines += [f"  {count:>8}  {kind}" for kind, count in summary.rejected_by_kind.items()]
    return "\n".join(lines)


def main() -> NoReturn:
    """Run the console script."""
    run_command(app)
