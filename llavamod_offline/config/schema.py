"""The settings that a configuration dataclass declares: keys, types, defaults, and the docstring under each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = "???"  # the default of settings that have none, as OmegaConf marks them
_INPUT = "input path"
InputPath = Annotated[str, _INPUT]  # a file or folder that must exist, or a URL


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, its type, its default (`REQUIRED` if it has none), and what it does."""

    key: str
    hint: Any
    default: Any
    doc: str


@dataclasses.dataclass(frozen=True)
class Section:
    """The settings of one dataclass, without nested ones; `prefix` is "" or ends in a dot."""

    prefix: str
    doc: str
    settings: tuple[Setting, ...]


def sections(schema: type[Any], prefix: str = "") -> Iterator[Section]:
    """Yield the section of a dataclass, then those nested in it, in the order of the fields.

    An optional section is also a setting, because it may be null.
    """
    found = list(_fields(schema, prefix))
    yield Section(
        prefix, _first_sentence(schema), tuple(setting for setting, inner in found if _is_value(setting, inner))
    )
    for setting, inner in found:
        if inner is not None:
            yield from sections(inner, f"{setting.key}.")


def settings(schema: type[Any]) -> list[Setting]:
    """List all settings, nested ones included."""
    return [setting for section in sections(schema) for setting in section.settings]


def fields(schema: type[Any]) -> list[tuple[Setting, type[Any] | None]]:
    """List a dataclass's own fields in order, each with its dataclass if it is a section."""
    return list(_fields(schema, ""))


def hint_of(schema: Any, names: Sequence[str]) -> Any:
    """The type of a setting, given the parts of its dotted key, `Annotated` included; None if there is none."""
    hint = schema
    for name in names:
        section = section_of(hint)
        kinds = [hint, *get_args(hint)]
        mapping = next((kind for kind in kinds if get_origin(kind) is dict), None)
        if section is not None:
            hint = get_type_hints(section, include_extras=True).get(name)
        elif mapping is not None:
            hint = get_args(mapping)[1]
        else:
            return None
    return hint


def section_of(hint: Any) -> type[Any] | None:
    """The dataclass of a section's type, optional or not; None for other types."""
    if get_origin(hint) in (dict, list):
        return None
    kinds = (kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind) and isinstance(kind, type))
    return next(kinds, None)


def holds_sections(hint: Any) -> bool:
    """Whether a setting is a section, or a mapping of names to sections."""
    mapping = get_origin(plain(hint)) is dict
    return section_of(get_args(plain(hint))[1] if mapping else hint) is not None


def plain(hint: Any) -> Any:
    """A type without `None` as an alternative and without `Annotated`."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return plain(kinds[0]) if is_optional(hint) and len(kinds) == 1 else hint


def is_optional(hint: Any) -> bool:
    """Whether a setting may be null."""
    return NoneType in get_args(hint)


def is_text(hint: Any) -> bool:
    """Whether a setting holds text, which is taken as typed."""
    return plain(hint) is str


def accepts_text(hint: Any) -> bool:
    """Whether a setting may be text, possibly as an alternative to a list or a mapping."""
    return is_text(hint) or (get_origin(hint) in (Union, UnionType) and any(map(is_text, get_args(hint))))


def item_of(hint: Any) -> Any:
    """The type of the items of a setting that is a list or may be one; None for other types."""
    lists = (kind for kind in (hint, *get_args(hint)) if get_origin(kind) is list)
    return next((get_args(kind)[0] for kind in lists), None)


def is_input(hint: Any) -> bool:
    """Whether a setting is an `InputPath`."""
    return any(_INPUT in get_args(kind)[1:] for kind in (hint, *get_args(hint)) if get_origin(kind) is Annotated)


def choices(hint: Any) -> tuple[Any, ...]:
    """The allowed values of a `Literal`; none for other types."""
    return get_args(plain(hint)) if get_origin(plain(hint)) is Literal else ()


def _is_value(setting: Setting, section: type[Any] | None) -> bool:
    return section is None or setting.default is None


def _fields(schema: type[Any], prefix: str) -> Iterator[tuple[Setting, type[Any] | None]]:
    hints = get_type_hints(schema, include_extras=True)
    docs = _field_docs(schema)
    for field in dataclasses.fields(schema):
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = REQUIRED if field.default is dataclasses.MISSING else field.default
        hint = hints[field.name]
        yield Setting(f"{prefix}{field.name}", hint, default, docs.get(field.name, "")), section_of(hint)


def _field_docs(schema: type[Any]) -> dict[str, str]:
    """The docstring under each field of a class, on one line, read from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def _first_sentence(schema: type[Any]) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(schema.__doc__ or "").split("\n\n")[0].split())
