"""Settings as text: every setting is explained, and printed settings load again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from eval.generate import EvalGenerateConfig
from llavamod_offline.config import describe_config, dump_config, load_config, print_config
from llavamod_offline.config.schema import settings
from teacher_cache.config import CacheTeacherConfig
from train.config import TrainConfig


@dataclass(frozen=True)
class Depth:
    """How deep."""

    layers: int | list[int] = 2
    """Number of layers."""


@dataclass(frozen=True)
class Plain:
    """A small configuration."""

    name: str
    """What it is called."""
    rate: float = 1e-3
    """Speed, in metres
    per second."""
    kind: Literal["a", "b"] = "a"
    """The kind."""
    sizes: tuple[float, float] = (1.0, 2.5)
    """Two sizes."""
    weights: dict[str, float] | None = None
    """Weights by name; null: none."""
    depth: Depth = field(default_factory=Depth)
    deeper: Depth | None = None
    """More depth."""
    seed: int | None = None
    """Seed; null: none."""


VALUES = (
    "plain", "2024_11_01", "007", "off", "null", "", " x ", "a: b", "a #b", "[1]", "${rate}", "'x'", 'say "hi"', "ä✓",
    "-", "runs/exp #2", "3e5", "a\\b", "a\nb", "?", "{", "@x", "%x", "!x",
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_what_is_dumped_loads_again(value: str, tmp_path: Path) -> None:
    config = Plain(value, 2e-5, "b", (0.1, 3.0), {value: 1.0, "other": 2.0}, Depth([1, 2]), Depth(4), 3)
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(Plain, [tmp_path / "dumped.yaml"]) == config


def test_every_setting_is_explained_above_it() -> None:
    assert (
        dump_config(Plain("x", deeper=Depth(4)))
        == """\
# Paths are relative to the current folder, not to this file.
# What it is called. (required)
name: x
# Speed, in metres per second. (default 0.001)
rate: 0.001
# The kind. [a | b] (default a)
kind: a
# Two sizes. (default [1.0, 2.5])
sizes: [1.0, 2.5]
# Weights by name; null: none. (default null)
weights: null

# How deep.
depth:
  # Number of layers. (default 2)
  layers: 2

# More depth.
deeper:
  # Number of layers. (default 2)
  layers: 4

# Seed; null: none. [whole number | null] (default null)
seed: null
"""
    )


def test_the_help_has_a_line_for_every_setting() -> None:
    assert describe_config(Plain, 70).splitlines() == [
        "A small configuration.",
        "  name (required)                 What it is called.",
        "  rate=0.001                      Speed, in metres per second.",
        "  kind=a                          The kind. [a | b]",
        "  sizes=[1.0, 2.5]                Two sizes.",
        "  weights=null                    Weights by name; null: none.",
        "  deeper=null                     More depth.",
        "  seed=null                       Seed; null: none. [whole number |",
        "                                  null]",
        "",
        "depth: How deep.",
        "  depth.layers=2                  Number of layers.",
        "",
        "deeper: How deep.",
        "  deeper.layers=2                 Number of layers.",
    ]


def test_the_help_shows_a_recipes_values_as_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rate: 0.5\nsizes: [3, 4]\ndepth: {layers: 7}\ndeeper: {layers: 8}\n")
    lines = describe_config(Plain, 70, recipe=recipe).splitlines()
    shown = dict(line.strip().split("  ")[0].split("=") for line in lines if "=" in line)
    assert shown == {
        **{"rate": "0.5", "kind": "a", "sizes": "[3.0, 4.0]", "weights": "null", "deeper": "{…}", "seed": "null"},
        **{"depth.layers": "7", "deeper.layers": "8"},
    }
    assert lines[1] == "  name (required)                 What it is called."


def test_a_configuration_is_printed_with_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That makes a file to fill in; settings that are given are still checked."""
    print_config(Plain, (), ["rate=3"])
    printed = capsys.readouterr().out
    assert "\nname: ???\n" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(Plain, [tmp_path / "printed.yaml"], ["name=n"]) == Plain("n", 3.0)


def test_the_defaults_of_a_recipe_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In sections, too; a required setting stays one, though the recipe has a value."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: n\ndepth: {layers: 7}\n")
    print_config(Plain, [recipe], ["depth.layers=9"], recipe=recipe)
    printed = capsys.readouterr().out
    assert "(default 7)\n  layers: 9\n" in printed
    assert "(required)\nname: n\n" in printed


@pytest.mark.parametrize("schema", [TrainConfig, CacheTeacherConfig, EvalGenerateConfig])
def test_no_setting_of_a_command_is_without_an_explanation(schema: type[Any]) -> None:
    described = describe_config(schema)
    for setting in settings(schema):
        assert setting.doc, f"{schema.__name__}: {setting.key} has no docstring"
        assert setting.doc.rstrip()[-1] == ".", f"{schema.__name__}: {setting.key}: no full stop"
        assert setting.key in described


@pytest.mark.parametrize("schema", [TrainConfig, CacheTeacherConfig, EvalGenerateConfig])
def test_the_printed_defaults_of_a_command_load_as_its_defaults(
    schema: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_config(schema)
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    print_config(schema, [tmp_path / "printed.yaml"])
    assert capsys.readouterr().out == printed
