"""`llavamod-offline rounds` on the command line."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llavamod_offline.config.command import Arguments, PrintConfig, settings_command


def _schema() -> type[Any]:
    from train.rounds.config import RoundsConfig

    return RoundsConfig


RoundsCommand = settings_command(_schema)


def rounds(
    arguments: Arguments = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the commands, to run any of them elsewhere, and exit.")
    ] = False,
    print_config: PrintConfig = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Distil on the student's own answers: in each round it writes, the teacher scores, and it learns.

    Every step is an ordinary command on ordinary sets, caches and runs below OUTPUT; OUTPUT/commands.sh lists them all,
    OUTPUT/logs holds what they printed. The result of a step run on another machine with the same files is used as it
    is. Rerun a stopped command to resume. OUTPUT/rounds.json and OUTPUT/report.html say what each round has gained.

    \b
    Examples:
      llavamod-offline rounds prompts=sets/general holdout=sets/unseen teacher=checkpoints/llava-qwen2-7b \\
        student=runs/mimic_dense/student output=runs/rounds rounds=2 steps=500
      llavamod-offline rounds rounds.yaml loss=policy_gradient 'score=[engine.kind=vllm]'
      llavamod-offline rounds rounds.yaml --commands
    """
    from llavamod_offline.config import load_config, split_arguments
    from llavamod_offline.config import print_config as print_settings
    from train.rounds.config import RoundsConfig

    given = split_arguments(arguments or [])
    if print_config:
        print_settings(RoundsConfig, *given)
        return
    config = load_config(RoundsConfig, *given)
    from llavamod_offline.demo.commands import as_script
    from train.rounds.plan import SCRIPT_HEAD, round_steps

    if commands:
        print(as_script(round_steps(config), SCRIPT_HEAD), end="")
        return
    from train.rounds.report import as_cells, header
    from train.rounds.run import run_rounds

    result = run_rounds(config)
    if as_json:
        print(json.dumps(result))
        return
    rows = result["rounds"]
    for names in zip(header(rows), *map(as_cells, rows), strict=True):
        print(f"{names[0]:40}" + "".join(f"{cell:>12}" for cell in names[1:]))
    print(f"\n{config.output}/report.html: the curves; {config.output}/rounds.json: the figures")
