"""`NAME=PLACE`, `NAME=NUMBER` and `NAME=TEXT`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavamod_offline.data.sources.source_arguments import parse_licences, parse_source, parse_weights
from llavamod_offline.errors import ConfigError


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("a/b.json") == ("", Path("a/b.json"))
    assert parse_source("caps=a/b=c.json") == ("caps", Path("a/b=c.json"))
    Path("lr=1.json").write_text("[]")
    assert parse_source("lr=1.json") == ("", Path("lr=1.json"))
    for argument in ("=a.json", "caps="):
        with pytest.raises(ConfigError, match="expected PATH or NAME=PATH"):
            parse_source(argument)


def test_weights() -> None:
    assert parse_weights(["a=2", "b=0.5", "x=y=0"]) == {"a": 2.0, "b": 0.5, "x=y": 0.0}
    for argument in ("a", "a=", "=2", "a=b"):
        with pytest.raises(ConfigError, match="expected NAME=NUMBER"):
            parse_weights([argument])
    with pytest.raises(ConfigError, match="weight of 'a' is given twice"):
        parse_weights(["a=2", "a=2"])


def test_licences() -> None:
    assert parse_licences(["a=mit", "b=see = there"]) == {"a": "mit", "b": "see = there"}
    for argument in ("a", "a=", "=mit", " = "):
        with pytest.raises(ConfigError, match="expected NAME=TEXT"):
            parse_licences([argument])
    with pytest.raises(ConfigError, match="licence of 'a' is given twice"):
        parse_licences(["a=mit", "a=mit"])
