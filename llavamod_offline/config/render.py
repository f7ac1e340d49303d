"""Settings as text: the list that `--help` shows, and YAML with an explanation above every setting."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from llavamod_offline.config.schema import REQUIRED, Setting, choices, fields, is_optional, plain, sections

_COLUMN = 34
_WIDTH = 120
_KINDS: dict[Any, str] = {int: "whole number", float: "number", bool: "true | false"}


def describe_config(schema: type[Any], width: int | None = None, *, recipe: Path | None = None) -> str:
    """List every setting of `schema` by section: its key, default, allowed values and what it does, for `--help`.

    `recipe`: a file whose values are shown as the defaults.
    """
    width = width or min(_WIDTH, shutil.get_terminal_size().columns)
    defaults = _recipe_values(schema, recipe) if recipe else {}
    blocks = []
    for section in sections(schema):
        if section.settings:
            heading = f"{section.prefix.removesuffix('.')}: {section.doc}" if section.prefix else section.doc
            lines = [_help_lines(setting, _at(defaults, setting), width) for setting in section.settings]
            blocks.append("\n".join([*textwrap.wrap(heading, width), *chain(*lines)]))
    return "\n\n".join(blocks)


def dump_config(config: Any) -> str:
    """Render a config object as YAML that `load_config` reads back, with an explanation above every setting."""
    return _as_yaml(type(config), dataclasses.asdict(config))


def print_config(
    schema: type[Any], files: Sequence[Path] = (), overrides: Sequence[str] = (), *, recipe: Path | None = None
) -> None:
    """Print the merged settings as `dump_config` does; required ones without a value as ???.

    `recipe`: the file whose values are shown as the defaults. Errors: those of `load_config`, except the one for
    missing values.
    """
    from omegaconf import OmegaConf

    from llavamod_offline.config.load import load_config, merge_config

    merged = merge_config(schema, files, overrides)
    if OmegaConf.missing_keys(merged):
        values: Any = OmegaConf.to_container(merged)
    else:
        values = dataclasses.asdict(load_config(schema, files, overrides))
    print(_as_yaml(schema, values, _recipe_values(schema, recipe) if recipe else None), end="")


def _recipe_values(schema: type[Any], recipe: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from llavamod_offline.config.load import merge_config

    values: Any = OmegaConf.to_container(merge_config(schema, [recipe]))
    return values  # type: ignore[no-any-return]


def _at(defaults: Mapping[str, Any], setting: Setting) -> Any:
    """A setting's value among nested defaults, else its own default."""
    value: Any = defaults
    for name in setting.key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return setting.default
        value = value[name]
    return value


def explained(setting: Setting) -> str:
    """What a setting does, with its allowed values."""
    allowed = " | ".join(str(choice) for choice in choices(setting.hint)) or _KINDS.get(plain(setting.hint), "")
    if plain(setting.hint) is bool and not is_optional(setting.hint):
        allowed = ""  # the default shows it
    if setting.default not in (None, REQUIRED) and not choices(setting.hint):
        allowed = ""
    if is_optional(setting.hint) and (allowed or setting.default is not None):
        allowed = f"{allowed} | null".removeprefix(" | ")
    return f"{setting.doc} [{allowed}]" if allowed else setting.doc


def _as_yaml(schema: type[Any], values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    head = "# Paths are relative to the current folder, not to this file.\n"
    return head + "\n".join(_yaml_lines(schema, values, defaults, "")) + "\n"


def _yaml_lines(
    schema: type[Any], values: Mapping[str, Any], defaults: Mapping[str, Any] | None, indent: str
) -> Iterator[str]:
    gap = False
    for setting, section in fields(schema):
        value = values[setting.key]
        usual = setting.default if setting.default == REQUIRED else (defaults or {}).get(setting.key, setting.default)
        if section is not None and isinstance(value, Mapping):
            doc = setting.doc or sections_doc(section)
            yield from ("", *_comment(doc, indent), f"{indent}{setting.key}:")
            yield from _yaml_lines(section, value, usual if isinstance(usual, Mapping) else None, f"{indent}  ")
            gap = True
        else:
            if gap:
                yield ""
                gap = False
            default = "required" if usual == REQUIRED else f"default {as_yaml(usual)}"
            yield from _comment(f"{explained(setting)} ({default})", indent)
            yield f"{indent}{setting.key}: {as_yaml(value)}"


def sections_doc(section: type[Any]) -> str:
    """What a section is about."""
    return next(sections(section)).doc


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _help_lines(setting: Setting, default: Any, width: int) -> list[str]:
    optional_section = isinstance(default, Mapping) and setting.default is None  # its own settings follow
    left = f"  {setting.key}={'{…}' if optional_section else as_yaml(default)}"
    left = f"  {setting.key} (required)" if default == REQUIRED else left
    lines = textwrap.wrap(explained(setting), max(width - _COLUMN, 20)) or [""]
    if len(left) >= _COLUMN:
        return [left, *(" " * _COLUMN + line for line in lines)]
    return [left.ljust(_COLUMN) + lines[0], *(" " * _COLUMN + line for line in lines[1:])]


def as_yaml(value: Any) -> str:
    """A value as YAML on one line, which `load_config` reads back unchanged."""
    if value == REQUIRED:
        return REQUIRED
    text = yaml.safe_dump([_plain(value)], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
