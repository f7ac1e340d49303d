"""How often a run decodes its cache's blocks."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path

import pytest

from llavamod_offline.data.pack.pack import write_set
from teacher_cache.format import columns
from teacher_cache.format.record import Records
from teacher_cache.read.reader import TeacherCache
from tests.tiny import tiny_samples
from tests.train.conftest import World, write_cache
from train.run import train


@pytest.mark.parametrize("window", ["null", "0", "2"])
def test_each_block_is_decoded_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str) -> None:
    """With a cache larger than a reader keeps by default, in any order within an epoch."""
    write_set(tiny_samples(24), tmp_path / "set", shard_samples=8)
    cache = write_cache(tmp_path / "cache", tmp_path / "set", world.teacher)
    decoded: list[tuple[str, int]] = []
    read = columns.ColumnFile.records

    def count(file: columns.ColumnFile, first: int, last: int, temperatures: tuple[float, ...]) -> list[Records]:
        decoded.extend((str(file.folder), number) for number in range(first, last))
        return read(file, first, last, temperatures)

    monkeypatch.setattr(TeacherCache, "__init__", partialmethod(TeacherCache.__init__, memory_bytes=0))
    monkeypatch.setattr(columns.ColumnFile, "records", count)
    settings = (f"data.set={tmp_path / 'set'}", f"cache.path={cache}", "batch.micro_size=1", "steps=3")
    train(world.config("mimic_dense", tmp_path / "run", *settings, f"data.window={window}"))
    assert len(decoded) == len(set(decoded)) == 3
