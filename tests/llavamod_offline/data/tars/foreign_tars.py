"""Tars as others write them, and as nobody should, made member by member."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavamod_offline.data.sample import Sample, Turn

Entry = tuple[str, bytes] | tarfile.TarInfo


def talk(*texts: str) -> list[dict[str, str]]:
    """A conversation in the form of LLaVA's JSON, the human first."""
    return [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]


def row(*texts: str, **fields: Any) -> bytes:
    """The JSON of a row with such a conversation."""
    return json.dumps({"conversations": talk(*texts)} | fields).encode()


def said(key: str, *texts: str, source: str, images: tuple[bytes, ...] = (), kinds: tuple[str, ...] = ()) -> Sample:
    """The sample that such a row becomes."""
    turns = tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
    return Sample(key, turns, images, kinds, source=source)


def special(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    """A member that is not a plain file."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.size = kind, target, size
    return header


def write_tar(path: Path, entries: Sequence[Entry], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write members in order, with their names as given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                header = tarfile.TarInfo(entry[0])
                header.size = len(entry[1])
                tar.addfile(header, io.BytesIO(entry[1]))
    return path
