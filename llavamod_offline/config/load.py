"""Merge YAML files and `key=value` arguments over a configuration dataclass's defaults."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llavamod_offline.config.problems import raise_problems, similar_settings, unknown_setting, wrong_value
from llavamod_offline.config.schema import (
    REQUIRED,
    accepts_text,
    hint_of,
    holds_sections,
    is_input,
    is_optional,
    is_text,
    item_of,
    settings,
)
from llavamod_offline.errors import ConfigError, first_line

T = TypeVar("T")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_MERGE_ERRORS = (OmegaConfBaseException, TypeError)  # the latter for a list where a mapping belongs


def load_config(schema: type[T], files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> T:
    """Merge defaults, YAML `files` in order, then dotted `key=value` overrides into a `schema` object.

    Errors: `ConfigError` for a missing or unreadable file, an unknown key (suggesting the one that may be meant), a
    value of the wrong type, missing values; `schema.__post_init__` may raise it for conflicting values. One error lists
    all problems of one kind.
    """
    merged = merge_config(schema, files, overrides)
    try:
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ConfigError(_no_value([setting.key for setting in settings(schema) if setting.key in missing]))
        return cast("T", OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # a ${reference} to nothing
        where = f"{error.full_key or 'config'}: {first_line(error)}"
        raise ConfigError(f"{where}: in text, write \\${{…}} for these characters") from error


def merge_config(schema: type[Any], files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> DictConfig:
    """Merge as `load_config` does, but without checking for missing values or conflicts."""
    merged = OmegaConf.structured(schema)
    read = [(file, read_yaml(schema, file)) for file in files]
    for file, update in read:
        merged = _merge(schema, merged, [update], f"{file}: ")
    merged = _merge(schema, merged, _read_overrides(schema, overrides), "")
    raise_problems(problem for file, update in read for problem in _beside(schema, merged, update, file))
    return merged


def _no_value(keys: Sequence[str]) -> str:
    names, typed = ", ".join(f"'{key}'" for key in keys), " ".join(f"{key}=VALUE" for key in keys)
    return f"no value for {names}: write {typed}, or set {'it' if len(keys) == 1 else 'them'} in a YAML file"


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate a command line's files from its `key=value` overrides, which apply after the files."""
    overrides = [argument for argument in arguments if "=" in argument and not os.path.isfile(argument)]
    return [Path(argument) for argument in arguments if argument not in overrides], overrides


def read_yaml(schema: type[Any], file: Path) -> DictConfig:
    if not file.is_file():
        raise ConfigError(_no_such_file(schema, file))
    try:
        loaded = OmegaConf.load(io.StringIO(_quote_text(schema, file.read_text(encoding="utf-8"))))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(f"{file}: {line}not readable as YAML: {error.problem or first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text, line {_line_of(file, error.start)}: save it as UTF-8") from error
    except Exception as error:
        raise ConfigError(f"{file}: not readable as YAML: {first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file}: a config file must hold a mapping of keys to values")
    return loaded


def _line_of(file: Path, place: int) -> int:
    return file.read_bytes()[:place].count(b"\n") + 1


def _no_such_file(schema: type[Any], file: Path) -> str:
    if file.is_dir():
        return f"{file}: is a folder, not a config file{_typed_as(schema, str(file))}"
    is_setting = hint_of(schema, str(file).split(".")) is not None
    near = similar_settings(schema, str(file)) if is_setting or (file.name == str(file) and not file.suffix) else []
    return f"no such config file: {file}" + (f"; to set {near[0]}, write {near[0]}=VALUE" if near else "")


def _typed_as(schema: type[Any], value: str) -> str:
    first = next((setting.key for setting in settings(schema) if is_input(setting.hint)), None)
    return f"; to set a path, write its key, such as {first}={value}" if first else ""


def _read_overrides(schema: type[Any], overrides: Sequence[str]) -> list[DictConfig]:
    read, problems = [], []
    for override in overrides:
        try:
            read.append(_read_override(schema, override))
        except ConfigError as error:
            problems.append(str(error))
    raise_problems(problems)
    return read


def _read_override(schema: type[Any], override: str) -> DictConfig:
    key, equals, text = override.partition("=")
    hint = hint_of(schema, key.split("."))
    if not equals:
        raise ConfigError(_no_such_file(schema, Path(override)))
    if hint is None:
        raise ConfigError(unknown_setting(schema, key))
    if not text and (not is_text(hint) or is_optional(hint) or is_input(hint) or _is_required(schema, key)):
        raise ConfigError(f"{key}= has no value: write {key}=VALUE without spaces around '='")
    left = next((name for name in _VARIABLE.findall(text) if hint_of(schema, [name]) is None), None)
    as_typed = is_text(hint) or (accepts_text(hint) and text[:1] not in ("[", "{"))
    if left and as_typed:
        raise ConfigError(f"{override}: ${{{left}}} has no value: let the shell replace it, in double quotes")
    try:
        if not as_typed:
            return OmegaConf.from_dotlist([f"{key}={_quote_text(hint, text)}"])
        value = None if text == "null" and is_optional(hint) else _expand_home(text).replace("${", r"\${")
        nested = OmegaConf.create({})
        OmegaConf.update(nested, key, value, force_add=True)
    except Exception as error:
        raise ConfigError(f"{wrong_value(key, hint, text)} ({first_line(error)})") from error
    return nested


def _is_required(schema: type[Any], key: str) -> bool:
    return any(setting.key == key and setting.default == REQUIRED for setting in settings(schema))


def _quote_text(hint: Any, text: str) -> str:
    """Rewrite YAML so that values whose type in the schema is `str` are read as written.

    YAML would read 2024_11_01 as a number. A leading ~/ becomes the home folder.
    """
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    _mark_text(hint, tree)
    return "" if tree is None else str(yaml.serialize(tree, Dumper=yaml.SafeDumper, allow_unicode=True))


def _mark_text(hint: Any, node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                _mark_text(str, key)
                _mark_text(hint_of(hint, [key.value]), value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _mark_text(item_of(hint), item)
    elif (
        isinstance(node, yaml.ScalarNode)
        and accepts_text(hint)
        and not (is_optional(hint) and node.tag.endswith(":null"))
    ):
        node.tag, node.value, node.style = "tag:yaml.org,2002:str", _expand_home(node.value), '"'


def _expand_home(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~/") else text


def _merge(schema: type[Any], merged: DictConfig, updates: Sequence[DictConfig], where: str) -> DictConfig:
    try:
        return cast("DictConfig", OmegaConf.merge(merged, *updates))
    except _MERGE_ERRORS as error:
        raise_problems(f"{where}{problem}" for update in updates for problem in _problems(schema, merged, update))
        raise ConfigError(f"{where}{first_line(error)}") from error


def _problems(schema: type[Any], merged: DictConfig, update: DictConfig) -> Iterator[str]:
    """Yield one line for each leaf of `update` that cannot be merged alone."""
    for names, value in leaves(schema, OmegaConf.to_container(update)):
        alone = value
        for name in reversed(names):
            alone = {name: alone}
        try:
            OmegaConf.merge(merged, OmegaConf.create(alone))
        except _MERGE_ERRORS:
            hint, key = hint_of(schema, names), ".".join(names)
            yield unknown_setting(schema, key) if hint is None else wrong_value(key, hint, value)


def leaves(schema: type[Any], tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the settings of a nested mapping: the parts of the dotted key, and the value."""
    for name, value in tree.items():
        names = (*above, str(name))
        if isinstance(value, Mapping) and value and holds_sections(hint_of(schema, names)):
            yield from leaves(schema, value, names)
        else:
            yield names, value


def _beside(schema: type[Any], merged: DictConfig, update: DictConfig, file: Path) -> Iterator[str]:
    """Name the inputs that are not where the file says, but beside the file, unless something overrides them."""
    now = dict(leaves(schema, OmegaConf.to_container(merged)))
    for names, value in leaves(schema, OmegaConf.to_container(update)):
        if not is_input(hint_of(schema, names)) or value != now.get(names):
            continue
        for path in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]:
            beside = file.parent / str(path)
            if isinstance(path, str) and not os.path.exists(path) and beside.exists():
                yield (
                    f"{file}: {'.'.join(names)}: no {path} in the current folder, but there is {beside}: paths are "
                    f"relative to the current folder: write {beside}, or run the command in {file.parent}"
                )
