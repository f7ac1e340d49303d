"""Configuration: frozen dataclasses, with YAML files and `key=value` arguments merged over their defaults.

Only commands use config objects; losses, models and stores take plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llavamod_offline.errors import ConfigError, first_line

T = TypeVar("T")


def load_config(schema: type[T], files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> T:
    """Merge defaults, YAML `files` in order, then dotted `key=value` overrides into a `schema` object.

    Errors: `ConfigError` for a missing or unreadable file, an unknown key (with the closest known one), a value of the
    wrong type, a missing required value; `schema.__post_init__` may raise it for conflicting values.
    """
    merged = OmegaConf.structured(schema)
    for file in files:
        merged = _merge(schema, merged, _read_yaml(schema, file), str(file))
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"argument '{override}': expected an existing YAML file, or key=value")
        merged = _merge(schema, merged, _read_override(schema, override), f"argument '{override}'")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"config: no value for '{missing[0]}': set it in a YAML file or as {missing[0]}=VALUE")
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


def _read_yaml(schema: type[Any], file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file")
    try:
        loaded = OmegaConf.load(io.StringIO(_quote_text(schema, file.read_text(encoding="utf-8"))))
    except Exception as error:
        raise ConfigError(f"{file}: not readable as YAML: {first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{file}: a config file must hold a mapping of keys to values")
    return loaded


def _read_override(schema: type[Any], override: str) -> Any:
    key, _, text = override.partition("=")
    hint = _type_of(schema, key)
    try:
        if not _is_text(hint):
            return OmegaConf.from_dotlist([f"{key}={_quote_text(hint, text)}"])
        value = None if text == "null" and hint is not str else _expand_home(text).replace("${", r"\${")
        nested: Any = OmegaConf.create({})
        OmegaConf.update(nested, key, value, force_add=True)
    except Exception as error:
        raise ConfigError(f"argument '{override}': {first_line(error)}") from error
    return nested


def _quote_text(hint: Any, text: str) -> str:
    """Rewrite YAML so that values whose type in the schema is `str` are read as they are written.

    YAML would make a number of 2024_11_01. A leading ~/ becomes the home folder.
    """
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    _mark_text(hint, tree)
    return "" if tree is None else str(yaml.serialize(tree, Dumper=yaml.SafeDumper, allow_unicode=True))


def _mark_text(hint: Any, node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _mark_text(_type_of(hint, key.value) if isinstance(key, yaml.ScalarNode) else None, value)
    elif isinstance(node, yaml.ScalarNode) and _is_text(hint) and (hint is str or not node.tag.endswith(":null")):
        node.tag, node.value, node.style = "tag:yaml.org,2002:str", _expand_home(node.value), '"'


def _type_of(hint: Any, key: str) -> Any:
    """The type of a dotted key below a dataclass, or below an optional one; None if it has no such key."""
    for name in key.split("."):
        kinds = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
        hint = get_type_hints(kinds[0]).get(name) if kinds else None
    return hint


def _is_text(hint: Any) -> bool:
    return hint is str or set(get_args(hint)) == {str, type(None)}


def _expand_home(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~/") else text


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
