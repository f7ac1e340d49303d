"""The parts that commands with settings share: their arguments, `--print-config`, and the list of settings in `--help`.

Imports nothing heavy, so that other commands of the same program start quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from llavamod_offline.errors import ConfigError

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG.yaml|KEY=VALUE", help="YAML files, then settings; later ones win."),
]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print all settings as YAML with explanations, to save and edit, and exit."),
]

_TYPED = "llavamod_offline.typed"
_HOW_TO_SET = """Settings: write KEY=VALUE, or KEY: VALUE in a YAML file.
Paths are relative to the current folder, even those inside a YAML file."""


class OneLineCommand(TyperCommand):
    """A command that answers a wrong command line with one line, and says what to write instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            raise _in_one_line(error, ctx, args) from error


def settings_command(
    schema: Callable[[], type[Any]], recipe: Callable[[list[str]], Path | None] = lambda words: None
) -> type[TyperCommand]:
    """Make the class of a command whose settings are the fields of a dataclass, imported only when needed.

    Its help ends with the settings; the defaults are those of the file that `recipe` finds for the words typed, if any.
    An option named like a setting is a `ConfigError` that says what to write instead.
    """

    class SettingsCommand(OneLineCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            ctx.meta[_TYPED] = list(args)
            own = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
            for place, argument in enumerate(args):
                name, equals, value = argument.partition("=")
                if argument.startswith("-") and name not in own:
                    _check_option(schema(), name, value if equals else "".join(args[place + 1 : place + 2]))
            return super().parse_args(ctx, args)

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            from llavamod_offline.config.render import describe_config

            super().format_epilog(ctx, formatter)
            formatter.write_paragraph()
            file = recipe(ctx.meta[_TYPED])
            defaults = f"Defaults are those of the recipe {file.stem}.\n" if file else ""
            formatter.write(f"{_HOW_TO_SET}\n{defaults}\n{describe_config(schema(), recipe=file)}\n")

    return SettingsCommand


class Commands(TyperGroup):
    """A group of commands that answers a wrong command line with one line, and says what to write instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_TYPED] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            raise _in_one_line(error, ctx, ctx.meta[_TYPED]) from error


def _in_one_line(error: Exception, ctx: Any, typed: list[str]) -> Exception:
    """Turn a usage error into a `ConfigError`; other errors, and the help for no arguments, stay as they are."""
    message = (
        error.format_message().rstrip(".").replace(": Value error,", ":").replace("Input should be", "must be")
        if hasattr(error, "format_message")
        else "\n"
    )
    if "\n" in message:
        return error
    wanted = getattr(error, "ctx", None) or ctx
    names = {name for parameter in wanted.command.get_params(wanted) for name in parameter.opts}
    for before, word in pairwise(["", *typed]):
        name, equals, value = word.partition("=")
        option = f"--{name.replace('_', '-')}"
        if equals and option in names:
            return ConfigError(f"{message[0].lower()}{message[1:]}: this command takes options: write {option} {value}")
        if before == "--json" and not word.startswith("-") and "extra argument" in message and "--output" in names:
            return ConfigError(f"--json takes no file: it prints to the terminal; write --output {word}")
    return ConfigError(f"{message[0].lower()}{message[1:]}: see {wanted.command_path} --help")


def _check_option(schema: type[Any], option: str, value: str) -> None:
    from llavamod_offline.config.problems import similar_settings

    near = similar_settings(schema, option.lstrip("-"))
    if near:
        value = value if value and not value.startswith("-") else "VALUE"
        raise ConfigError(f"no such option: {option}; settings are written as KEY=VALUE: write {near[0]}={value}")
