"""`train-student`: train a student through one stage, from its recipe."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from llavamod_offline import signals
from llavamod_offline.config import load_config, split_arguments
from llavamod_offline.config import print_config as print_settings
from llavamod_offline.config.command import Arguments, OneLineCommand, PrintConfig, settings_command
from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import ConfigError
from llavamod_offline.plural import counted
from llavamod_offline.storage.atomic import write_file
from train.config import MeasureConfig, TrainConfig
from train.config.recipes import changes_to_recipe, recipe_and_changes, recipe_names, recipe_of, resolve_config

if TYPE_CHECKING:
    from train.run_summary import TrainSummary

logger = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

reports = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

measurements = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.command(
    cls=settings_command(lambda: TrainConfig, recipe_of),
    epilog=f"Recipes: {', '.join(recipe_names())}; train-student RECIPE --help shows a recipe's defaults.",
)
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|CONFIG.yaml|KEY=VALUE",
            help="A recipe, or a YAML file that names its stage; then more files and settings; later ones win.",
        ),
    ],
    print_config: PrintConfig = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Train a student through one stage: align, mimic_dense, mimic_sparse, preference, or sft (no teacher).

    The teacher is never loaded: its outputs come from the cache. To resume a stopped run, rerun the same command. The
    student is written to OUTPUT/student, the log to OUTPUT/metrics.jsonl.

    \b
    Examples:
      train-student align data.set=sets/align student.vision_tower=clip-vit-large-patch14-336 \\
        student.language_model=Qwen2-1.5B output=runs/align
      train-student mimic_dense data.set=sets/general cache.path=caches/general \\
        student.checkpoint=runs/align/student output=runs/mimic_dense
      train-student mimic_sparse data.set=sets/multitask cache.path=caches/multitask \\
        student.checkpoint=runs/mimic_dense/student student.upcycle.num_experts=4 output=runs/mimic_sparse
      train-student preference data.set=sets/preference cache.path=caches/preference \\
        student.checkpoint=runs/mimic_sparse/student output=runs/preference
      train-student my.yaml optim.lr=1e-5 batch.micro_size=4 --print-config
      torchrun --nproc-per-node 8 --no-python train-student my.yaml
      train-student report runs/mimic_dense      # the curves as a page; see `train-student report --help`
      train-student measure student.checkpoint=runs/mimic_dense/student data.set=sets/unseen \\
        cache.path=caches/unseen
    """
    if print_config:
        files, changes = recipe_and_changes(arguments)
        print_settings(TrainConfig, files, changes, recipe=files[0] if files else None)
        return
    config = resolve_config(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        logger.info(changes_to_recipe(arguments))
    from train.run import train

    summary = train(config)
    if is_main and (as_json or summary.finished):
        print(json.dumps(asdict(summary)) if as_json else _render(summary))
    if not summary.finished:
        kept = f"the run is saved up to step {summary.steps} in {summary.output}" if summary.steps else ""
        raise signals.Stopped(signals.received(), kept)


def _render(summary: TrainSummary) -> str:
    loss = summary.metrics.get("loss", float("nan"))
    return (
        f"{summary.stage}: {counted(summary.steps, 'step')}, {counted(summary.tokens, 'token')} in "
        f"{summary.seconds:.0f} s, last loss "
        f"{loss:.4f}; {summary.parameters:,} parameters, {summary.activated_parameters:,} activated: {summary.student}"
    )


@reports.command(cls=OneLineCommand)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of train-student runs.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page; default: RUN/report.html.")
    ] = None,
) -> None:
    """Plot a run's curves and expert load on one self-contained page; several runs side by side.

    \b
    Examples:
      train-student report runs/mimic_sparse
      train-student report runs/mimic_dense runs/only_kd -o compare.html

    Also works on a run in progress.
    """
    if output is None and len(runs) > 1:
        raise ConfigError("--output: required for several runs, such as -o report.html")
    from train.report.page import write_report

    print(write_report(runs, output or runs[0] / "report.html"))


@measurements.command(cls=settings_command(lambda: MeasureConfig))
def measure(
    arguments: Arguments = None,
    print_config: PrintConfig = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the figures here, as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure how far a student is from its teacher, and from the answers, on a set that it has not seen.

    With a cache: KL(teacher ‖ student), and how often both have the same most likely token. Without: cross-entropy,
    accuracy and calibration error over the tokens of the set's answers.

    \b
    Examples:
      train-student measure student.checkpoint=runs/mimic_dense/student data.set=sets/unseen \\
        cache.path=caches/unseen
      train-student measure student.checkpoint=runs/sft/student data.set=sets/unseen --json -o unseen.json

    Exact with a cache of capture.preset=exhaustive.
    """
    files, changes = split_arguments(arguments or [])
    if print_config:
        print_settings(MeasureConfig, files, changes)
        return
    config = load_config(MeasureConfig, files, changes)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    from train.measure import measure as measured

    found = asdict(measured(config))
    if output is not None:
        write_file(output, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if as_json else _figures(found))


def _figures(found: dict[str, float | None]) -> str:
    counts = {name: found[name] for name in ("samples", "positions")}
    lines = [f"{name.replace('_', ' '):18} {value:,}" for name, value in counts.items()]
    means = {name: value for name, value in found.items() if name not in counts and value is not None}
    return "\n".join([*lines, *(f"{name.replace('_', ' '):18} {value:.4f}" for name, value in means.items())])


def main() -> NoReturn:
    """Run the console script; `report` and `measure` are subcommands, any other first argument a recipe or a file."""
    for name, subcommand in (("report", reports), ("measure", measurements)):
        if sys.argv[1:2] == [name]:
            run_command(subcommand, sys.argv[2:], name=f"train-student {name}")
    run_command(app)
