"""A cache with too many tables to open at once reads the same, shard by shard."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.folders import open_folder
from teacher_cache.format.manifest import SEQUENCES_NAME
from teacher_cache.read import reader as reader_module
from teacher_cache.read.reader import open_cache


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_what_is_opened_late_is_the_same(
    place: str, finished: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = open_cache(finished)
    where = str(finished)
    if place == "bucket":
        where = f"{bucket}/c"
        store = open_folder(where)
        for file in (path for path in finished.rglob("*") if path.is_file()):
            store.write(file.relative_to(finished).as_posix(), file.read_bytes())
    monkeypatch.setattr(reader_module, "_OPENED_BYTES", 0)
    monkeypatch.setattr("teacher_cache.read.lazy_rows._MOST_OPEN", 2)
    late = open_cache(where, staging=DiskCache(tmp_path / "staged") if place == "bucket" else None)
    items = eager.items()
    assert (len(late), late.items(), late.roles, late.shard_rows()) == (24, items, eager.roles, eager.shard_rows())
    assert late.keys("response") == eager.keys("response")
    assert late.numbers("n_position").tolist() == eager.numbers("n_position").tolist()
    rows = np.array([23, 0, 7, 7, 12])
    chosen = [items[row] for row in rows]
    for found in (late.records(rows), late.records(chosen)):
        for name, values in vars(eager.records(chosen)).items():
            assert np.array_equal(getattr(found, name), values), name
    keys = pa.chunked_array([pa.array([key for key, _ in items])])
    assert late.rows(keys, "response").tolist() == list(range(24))
    assert ("nobody", "response") not in late


def test_a_damaged_table_is_found_when_it_is_read(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "c"))
    name = open_cache(copy).shard_names[3]
    (copy / "shards" / name / SEQUENCES_NAME).write_bytes(b"nothing")
    with pytest.raises(CacheError, match=r"its checksum is not the one in cache.json"):
        open_cache(copy)
    monkeypatch.setattr(reader_module, "_OPENED_BYTES", 0)
    cache = open_cache(copy)
    assert len(cache.records(np.array([0, 14]))) > 0
    with pytest.raises(CacheError, match=rf"{name}/sequences.arrow: missing, or its checksum is not the one"):
        cache.records(np.array([15]))
