"""`verify` finds every flipped byte, every lost file and every number that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llavamod_offline.errors import CacheError
from teacher_cache.codec import COLUMN_AXES
from teacher_cache.columns import ColumnFile, write_columns
from teacher_cache.manifest import CACHE_NAME, MANIFEST_NAME, canonical, file_entries
from teacher_cache.reader import open_cache
from teacher_cache.store import CacheStore
from teacher_cache.verify import verify_cache

SHARD = "shards/samples-000002"


def test_a_sound_cache_is_sound(finished: Path) -> None:
    verdict = verify_cache(finished)
    cache = open_cache(finished)
    assert verdict.ok
    assert verdict.damage == []
    assert (verdict.shards, verdict.sequences, verdict.positions) == (5, 24, cache.positions)
    assert verdict.digest == cache.digest


def test_every_flipped_bit_is_found_and_its_file_named(small: Path, tmp_path: Path) -> None:
    """One flip in every file, and some more in those that everything hangs on."""
    path = Path(shutil.copytree(small, tmp_path / "copy"))
    generator = np.random.default_rng(0)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    assert len(files) > 50
    for file in [*files, *[path / CACHE_NAME, path / "job.json"] * 4]:
        sound = file.read_bytes()
        at = int(generator.integers(len(sound)))
        flipped = bytearray(sound)
        flipped[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(flipped)
        verdict = verify_cache(path)
        assert not verdict.ok, f"{file} byte {at}"
        assert any(file.relative_to(path).as_posix() in problem for problem in verdict.damage), verdict.damage
        file.write_bytes(sound)
    assert verify_cache(path).ok


def test_lost_shortened_and_foreign_files_are_named(copied: Callable[[], Path]) -> None:
    for harm, word in (("lose", "missing"), ("shorten", "damaged"), ("add", "not part of the cache")):
        path = copied()
        file = path / SHARD / "columns.zarr/entropy/c/0"
        if harm == "lose":
            file.unlink()
        elif harm == "shorten":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file = file.with_name("1")
            file.write_bytes(b"x")
        damage = verify_cache(path).damage
        assert f"{file.relative_to(path).as_posix()}: {word}" in damage


def test_a_lost_or_foreign_shard_is_named(copied: Callable[[], Path]) -> None:
    path = copied()
    shutil.rmtree(path / SHARD)
    assert any(problem.startswith(f"{SHARD}/{MANIFEST_NAME}: missing") for problem in verify_cache(path).damage)
    path = copied()
    shutil.copytree(path / SHARD, path / "shards/other")
    assert verify_cache(path).damage == ["shards/other: not a shard of this cache"]
    path = copied()
    shutil.rmtree(path / "shards")
    assert len(verify_cache(path).damage) >= 5


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [
        ("head_ids", 399, ""),  # nothing impossible in itself: only an audit against the teacher can tell
        ("target_ids", 1, "does not fit its records"),
        ("target_log_probs", 3.0, "target_log_probs"),
        ("entropy", -1.0, "entropy"),
        ("tail_log_mass", -0.1, "head_log_probs"),
        ("head_log_probs", np.nan, "head_log_probs"),
        ("log_normalisers", np.inf, "log_normalisers"),
        ("draw_repeats", 0, "draw_repeats"),
        ("head_counts", 3, "head_log_probs"),
    ],
)
def test_impossible_numbers_under_right_checksums_are_found(
    copied: Callable[[], Path], column: str, value: float, word: str
) -> None:
    """A writer with a defect: every checksum is right, the content is not."""
    path = copied()
    folder = path / SHARD / "columns.zarr"
    file = ColumnFile(folder)
    values = {name: file.read(name, 0, file.length(axis)).copy() for name, axis in COLUMN_AXES.items()}
    assert np.any(values[column][3] != value)
    values[column][3] = value
    shutil.rmtree(folder)
    write_columns(folder, values, file.codec)
    _seal(path)
    verdict = verify_cache(path)
    assert verdict.ok == (column == "head_ids")
    assert verdict.ok or any(word in problem and problem.startswith(SHARD) for problem in verdict.damage)


def test_counts_that_lie_are_found(copied: Callable[[], Path]) -> None:
    path = copied()
    file = path / SHARD / MANIFEST_NAME
    manifest = json.loads(file.read_bytes())
    manifest["positions"] += 1
    file.write_bytes(canonical(manifest))
    _seal(path, manifests=False)
    assert any("positions, there are" in problem for problem in verify_cache(path).damage)


def test_no_cache_and_an_unfinished_one_are_errors(tmp_path: Path, copied: Callable[[], Path]) -> None:
    with pytest.raises(CacheError, match="it is no cache"):
        verify_cache(tmp_path)
    path = copied()
    (path / CACHE_NAME).unlink()
    with pytest.raises(CacheError, match="run `cache-teacher run` again to finish it"):
        verify_cache(path)


def _seal(path: Path, *, manifests: bool = True) -> None:
    """Make all checksums right again."""
    job = json.loads((path / "job.json").read_bytes())
    (path / CACHE_NAME).unlink()
    if manifests:
        file = path / SHARD / MANIFEST_NAME
        manifest = json.loads(file.read_bytes())
        file.unlink()
        manifest["files"] = file_entries(file.parent)
        file.write_bytes(canonical(manifest))
    CacheStore.open(path, job["fingerprint"], job["shards"]).finalise()
