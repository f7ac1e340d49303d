"""`llavamod-offline`: pack data into sets of samples, check data sets, ask a model, run rounds or the demo."""

from __future__ import annotations

import importlib
import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from llavamod_offline import __version__
from llavamod_offline.config.command import Commands
from llavamod_offline.demo.cli import demo, ladder, toyworld
from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import DataError, EmptySetError
from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from llavamod_offline.data.pack.set_writer import PackSummary

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__,
)


class Keys(StrEnum):
    """Where the samples' keys come from."""

    ID = "id"
    ROW = "row"


class TarKeys(StrEnum):
    """Where the keys of a tar's samples come from."""

    MEMBER = "member"
    SHARD = "shard"


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing set.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
MaxRejected = Annotated[
    float, typer.Option(min=0, max=1, help="Largest share of rows that may be rejected; more is an error.")
]
WeightOption = Annotated[
    list[str] | None,
    typer.Option("--weight", metavar="NAME=N", help="How often training sees a source's samples; may be repeated."),
]
LicenceOption = Annotated[
    list[str] | None,
    typer.Option("--licence", metavar="NAME=TEXT", help="Licence of a source, kept in the set; may be repeated."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Number of processes [default: all cores].")]
CaptionPrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Prompt for captions (KEY.txt); required if there are any."),
]
Ignore = Annotated[list[str] | None, typer.Option(metavar="SUFFIX", help="Suffix of files to ignore; may be repeated.")]
GraceOption = Annotated[
    float,
    typer.Option(
        "--grace", metavar="SECONDS", help="On SIGTERM, finish the work in hand if it takes no longer than this."
    ),
]
Root = Annotated[Path, typer.Option(metavar="DIR", help="Folder that the list's paths are relative to.")]
SourceList = Annotated[
    Path | None, typer.Option("--from", metavar="YAML", help="A list of data sets [default: the shipped one].")
]


@app.callback()
def _commands() -> None:
    """Make sets of samples for capture, training and evaluation."""


@app.command()
def pack(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The set folder to make.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]SOURCE...",
            help="Rows in .json, .jsonl, .parquet, .arrow, also by URL; folders of tables or of samples.",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of images; may be repeated.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Pack the data sets that the list names for this stage.")] = None,
    source_list: SourceList = None,
    root: Root = Path(),
    weight: WeightOption = None,
    licence: LicenceOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the shards [default: the folder's name].")] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Largest number of samples in a shard.")] = 1000,
    keys: Annotated[Keys, typer.Option(help="Sample keys: the rows' ids, or file name and row number.")] = Keys.ID,
    caption_prompt: CaptionPrompt = None,
    ignore: Ignore = None,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink images whose longer side has more pixels than this.")
    ] = None,
    max_rejected: MaxRejected = 0.5,
    workers: Workers = None,
    overwrite: Overwrite = False,
    grace: GraceOption = 0.0,
    as_json: AsJson = False,
) -> None:
    """Pack conversations or preferences and their images into a set: WebDataset shards with an index.

    Unusable rows are counted and listed with the reason in the set's rejected.jsonl; the rest is packed. If more
    than --max-rejected are unusable, no set is made, and the list is kept as OUTPUT.rejected.jsonl.
    Images keep their bytes unless --max-side shrinks them. The number of workers does not change the set.
    With --grace, SIGTERM ends with exit status 4 if the shard in hand was finished first; a rerun continues either way.
    Rows may be in LLaVA's or RLAIF-V's format or chat messages; llavamod_offline/README.md lists their fields.
    A folder of samples has KEY.json or KEY.txt beside KEY.jpg, like the tars that `index` reads.

    \b
    Examples:
      llavamod-offline pack llava_v1_5_mix665k.json --images data/llava --keys row --output sets/general
      llavamod-offline pack caps=captions.json chat.jsonl --images coco --images own --weight caps=0.5 --output sets/mix
      llavamod-offline pack RLAIF-V-Dataset_*.parquet --output sets/preference --max-rejected 0.01
      llavamod-offline pack --stage mimic_dense --root data --keys row --output sets/mimic_dense
    """
    from llavamod_offline.data.pack.pack import write_set
    from llavamod_offline.data.sources.catalogue import SHIPPED, check_root, read_catalogue, stage_sources
    from llavamod_offline.data.sources.fitting_folders import advice_on_missing
    from llavamod_offline.data.sources.image_folders import ImageFolders
    from llavamod_offline.data.sources.read import prepare_sources
    from llavamod_offline.data.sources.source import Source, check_sources, describe_sources, sources_size
    from llavamod_offline.data.sources.source_arguments import parse_licences, parse_source, parse_weights
    from llavamod_offline.data.tars.tar_samples import ReadRule
    from llavamod_offline.grace import Grace
    from llavamod_offline.processes import available_cores
    from llavamod_offline.progress import ProgressBar

    rule = ReadRule.of(caption_prompt, ignore or ())
    given = [Source(path, named, rule=rule) for named, path in map(parse_source, sources or [])]
    weights: dict[str, float] = {}
    listed_licences: dict[str, str] = {}
    if stage is not None:
        check_root(root)
        listed, weights, listed_licences = stage_sources(read_catalogue(source_list or SHIPPED), stage, root)
        given = [*listed, *given]
    if not given:
        raise typer.BadParameter("name source files, or a --stage", param_hint="SOURCE")
    files = check_sources(given, images or (), by_row=keys is Keys.ROW)
    folders = ImageFolders(list(dict.fromkeys(folder for source in files for folder in source.images)))
    with Grace(grace) as stop, ProgressBar("pack", sources_size(files), "B", scale=True) as bar:
        rows = partial(
            prepare_sources,
            files,
            images=images or (),
            keys=keys.value,
            advance=bar.advance,
            max_side=max_side,
            workers=workers or available_cores(),
        )
        hint = "number the rows with --keys row" if keys is Keys.ID else "rename one of the files"
        try:
            summary = write_set(
                lambda start: rows(start=start),
                output,
                job={
                    "sources": describe_sources(files),
                    "keys": keys.value,
                    "max_side": max_side,
                    "version": __version__,
                },
                name=name,
                shard_samples=shard_samples,
                overwrite=overwrite,
                max_rejected=max_rejected,
                duplicate_hint=hint,
                weights=weights | parse_weights(weight or []),
                licences=parse_licences(licence or []),
                listed_licences=listed_licences,
                max_side=max_side,
                fitting=lambda missing: advice_on_missing(missing, images or ()),
                can_use=folders.can_use,
                grace=stop,
            )
        except EmptySetError as error:
            names = ", ".join(f"'{source.path}'" for source in given[:3]) + (", …" if len(given) > 3 else "")
            raise DataError(f"{names}: {error}") from error
    print(json.dumps(summary.to_json(), ensure_ascii=False) if as_json else _render(summary, "packed"))


@app.command()
def index(
    sources: Annotated[
        list[str], typer.Argument(metavar="[NAME=]PATH...", help="Tars or folders of tars, also by URL.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The set folder to make.")],
    caption_prompt: CaptionPrompt = None,
    keys: Annotated[
        TarKeys, typer.Option(help="Sample keys: the members' own, or prefixed with the tar's name.")
    ] = TarKeys.MEMBER,
    ignore: Ignore = None,
    weight: WeightOption = None,
    licence: LicenceOption = None,
    max_rejected: MaxRejected = 0.5,
    workers: Workers = None,
    overwrite: Overwrite = False,
    grace: GraceOption = 0.0,
    as_json: AsJson = False,
) -> None:
    """Make a set from existing WebDataset tars, without copying them.

    A sample is KEY.json, as `pack` writes it or in any row format, or a caption KEY.txt or KEY.cls, beside its image
    KEY.jpg (.jpeg, .png, .webp) or images KEY.0.jpg, KEY.1.jpg and so on. Each tar is read once. Tars beside or below
    the new set's folder may be moved together with it; others must stay in place. If stopped, indexing starts over,
    unless --grace leaves it enough time to finish.

    \b
    Examples:
      llavamod-offline index data/tars --output data/tars/set
      llavamod-offline index cc3m=data/cc3m --caption-prompt "Describe the image briefly." --output sets/cc3m
    """
    from llavamod_offline.data.sources.source_arguments import parse_licences, parse_source, parse_weights
    from llavamod_offline.data.tars.tar_index import find_tars, index_tars
    from llavamod_offline.grace import Grace
    from llavamod_offline.processes import available_cores
    from llavamod_offline.progress import ProgressBar
    from llavamod_offline.storage.remote_file import RemoteFile, place_size

    tars = [tar for named, path in map(parse_source, sources) for tar in find_tars([path], named)]
    total = sum(place_size(tar.path) for tar in tars if isinstance(tar.path, RemoteFile) or tar.path.is_file())
    with Grace(grace) as stop, ProgressBar("index", total, "B", scale=True) as bar:
        summary = index_tars(
            tars,
            output,
            keys=keys.value,
            caption_prompt=caption_prompt,
            ignore=ignore or (),
            overwrite=overwrite,
            max_rejected=max_rejected,
            weights=parse_weights(weight or []),
            licences=parse_licences(licence or []),
            workers=workers or available_cores(),
            advance=bar.advance,
            grace=stop,
        )
    print(json.dumps(summary.to_json(), ensure_ascii=False) if as_json else _render(summary, "indexed"))


@app.command()
def doctor(
    source_list: Annotated[
        Path | None, typer.Argument(metavar="[YAML]", help="A list of data sets [default: the shipped one].")
    ] = None,
    root: Root = Path(),
    stage: Annotated[str | None, typer.Option(help="Only the data sets of this stage.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Check only for files and folders, not for rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the data sets of each stage: what is on disk, what is missing, and where to download it.

    The shipped list covers LLaVA-MoD's data and some larger sets. Counts rows and looks for every image they name.
    Exits with status 1 if anything is missing.

    \b
    Examples:
      llavamod-offline doctor --root data
      llavamod-offline doctor --root data --stage mimic_dense --quick
      llavamod-offline doctor my_sources.yaml --root data --json
    """
    from llavamod_offline.data.sources.catalogue import SHIPPED, check_root, find_files, read_catalogue
    from llavamod_offline.data.sources.doctor import examine, render
    from llavamod_offline.progress import ProgressBar

    check_root(root)
    sets = read_catalogue(source_list or SHIPPED).of_stage(stage)
    total = sum(
        path.stat().st_size for entry in sets.values() for _, found in find_files(entry, root) for path in found
    )
    with ProgressBar("doctor", total, "B", scale=True, silent=quick) as bar:
        findings = list(examine(sets, root, count=not quick, advance=bar.advance))
    if as_json:
        print(json.dumps([finding.to_json() for finding in findings], ensure_ascii=False))
    else:
        print("\n".join(render(finding) for finding in findings))
    incomplete = sum(bool(finding.problems) for finding in findings)
    if not as_json:
        print(f"{len(findings) - incomplete} of {len(findings)} data sets are complete below {root}")
    if incomplete:
        raise typer.Exit(1)


for command in (toyworld, demo, ladder):
    app.command()(command)
# These commands live in packages above this one, which modules here may not import by name.
app.command()(importlib.import_module("teacher_cache.cli.ask").ask)
_rounds = importlib.import_module("train.rounds.cli")
app.command(cls=_rounds.RoundsCommand)(_rounds.rounds)


def _render(summary: PackSummary, done: str) -> str:
    unpaired = f"{counted(summary.unpaired, 'unpaired answer')}, " if summary.unpaired else ""
    lines = [
        f"{done} {counted(summary.samples, 'sample')} ({counted(summary.conversations, 'conversation')}, "
        f"{counted(summary.preferences, 'preference')}, {unpaired}{counted(summary.images, 'image')}) into "
        f"{summary.path}: "
        f"{counted(summary.shards, 'shard')}, {summary.bytes / 1e6:.1f} MB"
    ]
    if summary.shrunk:
        lines.append(f"shrank {counted(summary.shrunk, 'image')}")
    if summary.rejected:
        rows = counted(summary.samples + summary.rejected, "row")
        lines.append(f"rejected {summary.rejected} of {rows}, listed in {summary.path / 'rejected.jsonl'}:")
        lines += [f"  {count:>8}  {kind}" for kind, count in summary.rejected_by_kind.items()]
        lines.append(f"  {summary.diagnosis}")
    return "\n".join(lines)


def main() -> NoReturn:
    """Run the console script."""
    run_command(app)
