"""Configuration: frozen dataclasses, with YAML files and `key=value` arguments merged over their defaults.

Config objects stop at the commands: losses, models and stores take plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llavamod_offline.errors import ConfigError, first_line

T = TypeVar("T")


def load_config(schema: type[T], files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> T:
    """Merge defaults, YAML `files` in order, then dotted `key=value` overrides into a `schema` object.

    Errors: `ConfigError` for a missing or unreadable file, an unknown key (with the nearest right one), a value of the
    wrong type, a missing required value; `schema.__post_init__` may raise it for values that do not fit together.
    """
    merged = OmegaConf.structured(schema)
    for file in files:
        merged = _merge(schema, merged, _read_yaml(file), str(file))
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"argument '{override}': expected a YAML file that exists, or key=value")
        merged = _merge(schema, merged, _read_override(override), f"argument '{override}'")
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"config: no value for '{missing[0]}': set it in a YAML file or as {missing[0]}=VALUE")
    try:
        return cast("T", OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {first_line(error)}") from error


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate a command line's files from its `key=value` overrides, which apply after the files."""
    files = [Path(argument) for argument in arguments if "=" not in argument]
    return files, [argument for argument in arguments if "=" in argument]


def dump_config(config: Any) -> str:
    """Render a config object as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_config(schema: type[Any]) -> str:
    """List every key of `schema` with its type and default, one a line, for `--help`."""
    return "\n".join(_describe(schema, ""))


def _describe(schema: type[Any], prefix: str) -> list[str]:
    hints = get_type_hints(schema)
    lines = []
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += _describe(cast("type[Any]", hint), f"{prefix}{field.name}.")
            continue
        if field.default is not dataclasses.MISSING:
            default = "required" if field.default == "???" else repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        else:
            default = "required"
        name = getattr(hint, "__name__", None) if not getattr(hint, "__args__", None) else None
        optional = [argument for argument in get_args(hint) if dataclasses.is_dataclass(argument)]
        if optional:
            lines.append(f"{prefix}{field.name}: mapping | None = {default}")
            lines += _describe(cast("type[Any]", optional[0]), f"{prefix}{field.name}.")
            continue
        lines.append(f"{prefix}{field.name}: {name or str(hint).replace('typing.', '')} = {default}")
    return lines


def _read_yaml(file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file")
    try:
        loaded = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{file}: not readable as YAML: {first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{file}: a config file must hold a mapping of keys to values")
    return loaded


def _read_override(override: str) -> Any:
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise ConfigError(f"argument '{override}': {first_line(error)}") from error


def _merge(schema: type[Any], merged: Any, update: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(merged, update)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        message = first_line(error)
        if "not in" in message and "Did you mean" not in message:
            nearest = difflib.get_close_matches(key, [line.split(":")[0] for line in _describe(schema, "")], n=1)
            message = f"unknown key '{key}'" + (f". Did you mean: '{nearest[0]}'?" if nearest else "")
        elif "is not a ListConfig" in message:
            message = f"takes a list: write [{OmegaConf.select(update, key)}]"
        raise ConfigError(f"{where}: {key}: {message}" if key else f"{where}: {message}") from error
