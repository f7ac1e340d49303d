"""Parse sources, their weights and licences from the command line: `NAME=PATH`, `NAME=NUMBER` and `NAME=TEXT`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.folders import is_url
from llavamod_offline.storage.remote_file import Place, RemoteFile


def parse_source(argument: str) -> tuple[str, Place]:
    """The name (or '') and the path or URL of a source; an existing path wins even if it contains "=".

    Errors: `ConfigError` for an empty name or path.
    """
    if is_url(argument):
        return "", RemoteFile(argument)
    name, equals, place = argument.partition("=")
    if name.strip() and is_url(place) and not os.path.exists(argument):
        return name, RemoteFile(place)
    if not equals or os.path.exists(argument):
        return "", Path(argument)
    if not name.strip() or not place:
        raise ConfigError(f"source '{argument}': expected PATH or NAME=PATH")
    return name, Path(place)


def parse_weights(arguments: Sequence[str]) -> dict[str, float]:
    """The weights of sources by name. Errors: `ConfigError` for anything but `NAME=NUMBER`, or a repeated name."""
    weights: dict[str, float] = {}
    for argument in arguments:
        name, _, number = argument.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            name, weight = "", 0.0
        if not name:
            raise ConfigError(f"weight '{argument}': expected NAME=NUMBER, such as captions=0.5")
        if name in weights:
            raise ConfigError(f"weight of '{name}' is given twice")
        weights[name] = weight
    return weights


def parse_licences(arguments: Sequence[str]) -> dict[str, str]:
    """The licences of sources by name. Errors: `ConfigError` for anything but `NAME=TEXT`, or a repeated name."""
    licences: dict[str, str] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if not name.strip() or not text.strip():
            raise ConfigError(f"licence '{argument}': expected NAME=TEXT, such as captions=cc-by-4.0")
        if name in licences:
            raise ConfigError(f"licence of '{name}' is given twice")
        licences[name] = text
    return licences
