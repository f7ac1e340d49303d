"""The recipes: for each stage, the settings that a run starts from."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf

from llavamod_offline.config import load_config, raise_problems, split_arguments
from llavamod_offline.config.load import leaves, merge_config, read_yaml
from llavamod_offline.config.render import as_yaml
from llavamod_offline.config.schema import hint_of, is_input
from llavamod_offline.errors import ConfigError
from train.config.train import Stage, TrainConfig

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """List the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_of(words: Sequence[str]) -> Path | None:
    """Find the packaged recipe that a command line starts from, if it names one."""
    return next((RECIPES / f"{word}.yaml" for word in words if word in recipe_names()), None)


def resolve_config(arguments: Sequence[str]) -> TrainConfig:
    """Merge a recipe, YAML files and `key=value` overrides into a configuration. Errors: `ConfigError`."""
    return load_config(TrainConfig, *recipe_and_changes(arguments))


def recipe_and_changes(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split a command line into YAML files, the first of them a packaged recipe, and `key=value` overrides.

    The recipe is the one named first, or that of the `stage` that a file or an override sets. Errors: `ConfigError` for
    no stage, or conflicting ones.
    """
    words, overrides = split_arguments(arguments)
    files = [_recipe(word) for word in words]
    named = list(_stages(files, overrides))
    if not named:
        raise ConfigError(_no_stage(files))
    (first, stage), *others = named
    raise_problems(
        f"{first} names stage {stage}, but {place} names {other}: choose one of them"
        for place, other in others
        if other != stage
    )
    if (files and files[0].parent == RECIPES) or stage not in get_args(Stage):  # other values are refused when loaded
        return files, overrides
    return [RECIPES / f"{stage}.yaml", *files], overrides


def changes_to_recipe(arguments: Sequence[str]) -> str:
    """Name the recipe of a command line and the settings that it changes, as in `optim.lr=1.0e-05 (was 2.0e-05)`.

    Leaves out what a recipe cannot know: the output and the inputs.
    """
    files, overrides = recipe_and_changes(arguments)
    before, now = (
        dict(leaves(TrainConfig, OmegaConf.to_container(merge_config(TrainConfig, *given))))
        for given in ((files[:1],), (files, overrides))
    )
    changed = [
        f"{'.'.join(names)}={as_yaml(value)} (was {_as_it_was(before, names)})"
        for names, value in now.items()
        if (names not in before or value != before[names]) and names != ("output",)
        if not is_input(hint_of(TrainConfig, names))
    ]
    return f"recipe {files[0].stem}" + (f", changed: {', '.join(changed)}" if changed else "")


def _as_it_was(before: Mapping[tuple[str, ...], Any], names: tuple[str, ...]) -> str:
    """Return a setting's value in the recipe; a section that either side leaves out has no value of its own."""
    if names in before:
        return as_yaml(before[names])
    return "null" if names[:-1] in before else "set"


def _stages(files: Sequence[Path], overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each place that names a stage, with the stage."""
    for file in files:
        stage = read_yaml(TrainConfig, file).get("stage")
        if stage is not None:
            yield (f"recipe {file.stem}" if file.parent == RECIPES else str(file)), str(stage)
    for override in overrides:
        if override.startswith("stage="):
            yield f"'{override}'", override.removeprefix("stage=")


def _no_stage(files: Sequence[Path]) -> str:
    choice = ", ".join(get_args(Stage))
    if not files:
        return f"no recipe: name one first, as in 'train-student sft …': {choice}"
    return f"{files[0]}: names no stage: add 'stage: …', or name a recipe before the file: {choice}"


def _recipe(file: Path) -> Path:
    """Find the packaged recipe of a bare name, unless a file has that name. Errors: `ConfigError` if neither exists."""
    if file.is_file() or file.suffix or file.name != str(file):
        return file
    names = recipe_names()
    if file.name not in names:
        nearest = difflib.get_close_matches(file.name, names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the recipes are {', '.join(names)}"
        raise ConfigError(f"no such recipe or config file: {file}; {hint}")
    return RECIPES / f"{file.name}.yaml"
