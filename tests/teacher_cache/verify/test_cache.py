"""`verify` finds every flipped byte, every lost file and every impossible number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llavamod_offline.errors import CacheError
from teacher_cache.format.columns import ColumnFile, write_blocks
from teacher_cache.format.manifest import CACHE_NAME, MANIFEST_NAME, canonical, file_entries
from teacher_cache.format.rejection import Rejection
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.write.store import CacheStore
from tests.teacher_cache.capture.driver import CODEC, FINGERPRINT, NAMES, captured
from tests.teacher_cache.conftest import FLOAT32, World

SHARD = "shards/samples-000002"


def test_a_sound_cache_is_sound(finished: Path) -> None:
    verdict = verify_cache(finished)
    cache = open_cache(finished)
    assert verdict.ok
    assert verdict.damage == []
    assert (verdict.shards, verdict.sequences, verdict.positions) == (5, 24, cache.positions)
    assert verdict.digest == cache.digest


def test_rejections_may_say_from_where_their_samples_were_packed(tmp_path: Path) -> None:
    """As in sets packed from files; a row with any other field counts as damage."""
    lost = [Rejection("a", "response", "no"), Rejection("b", "response", "no", "rows.json", 7)]
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES[:1])
    store.start()
    store.commit(NAMES[0], captured(NAMES[0]), lost, CODEC)
    store.finalise()
    assert verify_cache(tmp_path / "c").damage == []
    other = CacheStore.open(tmp_path / "other", FINGERPRINT, NAMES[:1])
    other.start()
    other.commit(NAMES[0], captured(NAMES[0]), [Rejection("b", "response", "no", file="rows.json")], CODEC)
    other.finalise()
    assert [line for line in verify_cache(tmp_path / "other").damage if "has other fields" in line]


def test_lost_shortened_and_foreign_files_are_named(copied: Callable[[], Path]) -> None:
    for harm, word in (("lose", "missing"), ("shorten", "damaged"), ("add", "not part of the cache")):
        path = copied()
        file = path / SHARD / "columns.zarr/entropy/c/0/0"
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
    assert verify_cache(path).damage == ["shards/other: not part of the cache"]
    path = copied()
    shutil.rmtree(path / "shards")
    assert len(verify_cache(path).damage) >= 5


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [
        ("id_codes", 255, "high numbers"),
        ("id_low", 255, "beyond the vocabulary"),
        ("target_slots", 200, "cannot be decoded"),
        ("head_counts", 0, "ids for"),
        ("head_counts", 9, "ids for"),
        ("outside_log_probs", 60000, "does not match its records"),
    ],
)
def test_impossible_numbers_under_right_checksums_are_found(
    copied: Callable[[], Path], column: str, value: float, word: str
) -> None:
    """As from a buggy writer: every checksum is right, the content is not."""
    path = copied()
    file = ColumnFile(path / SHARD / "columns.zarr")
    _rewrite(path, file, column, value)
    verdict = verify_cache(path)
    assert not verdict.ok
    assert any(word in problem and problem.startswith(SHARD) for problem in verdict.damage)


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [
        ("outside_log_probs", 3.0, "target_log_probs"),
        ("entropy", -1.0, "entropy"),
        ("tail_log_mass", -0.1, "head_log_probs"),
        ("head_log_probs", np.nan, "head_log_probs"),
        ("log_normalisers", np.inf, "log_normalisers"),
    ],
)
def test_impossible_exact_numbers_are_found(world: World, tmp_path: Path, column: str, value: float, word: str) -> None:
    world.run(tmp_path / "c", FLOAT32, "capture.top_k=3")
    _rewrite(tmp_path / "c", ColumnFile(tmp_path / "c" / SHARD / "columns.zarr"), column, value)
    verdict = verify_cache(tmp_path / "c")
    assert any(word in problem and problem.startswith(SHARD) for problem in verdict.damage)


def _rewrite(path: Path, file: ColumnFile, column: str, value: float) -> None:
    """Change the fourth number of a column and recompute every checksum."""
    blocks = [{name: array.copy() for name, array in block.items()} for block in file.columns(0, file.blocks)]
    assert blocks[0][column][..., 3].flat[0] != value
    blocks[0][column][..., 3] = value
    folder = path / SHARD / "columns.zarr"
    shutil.rmtree(folder)
    write_blocks(
        folder,
        blocks,
        file.codec,
        positions=file.positions,
        frequent_F=file.frequent_ids_F,
        profile=np.zeros(len(file.frequent_ids_F) + 1, np.float32),
    )
    _seal(path)


def test_counts_that_lie_are_found(copied: Callable[[], Path]) -> None:
    path = copied()
    file = path / SHARD / MANIFEST_NAME
    manifest = json.loads(file.read_bytes())
    manifest["positions"] += 1
    file.write_bytes(canonical(manifest))
    _seal(path, manifests=False)
    assert any("positions, found" in problem for problem in verify_cache(path).damage)


def test_a_sequence_that_is_there_twice_is_named(tmp_path: Path) -> None:
    store = CacheStore.open(tmp_path / "c", FINGERPRINT, NAMES[:2])
    store.start()
    for name in NAMES[:2]:
        store.commit(name, captured(NAMES[0]), [], CODEC)
    store.finalise()
    damage = [f"shards/s-1/sequences.arrow: 's-0-{number}' (response) is in the cache twice" for number in range(3)]
    assert verify_cache(tmp_path / "c").damage == damage


def test_no_cache_and_an_unfinished_one_are_errors(tmp_path: Path, copied: Callable[[], Path]) -> None:
    with pytest.raises(CacheError, match="it is not a cache"):
        verify_cache(tmp_path)
    path = copied()
    (path / CACHE_NAME).unlink()
    with pytest.raises(CacheError, match="rerun `cache-teacher run` to finish it"):
        verify_cache(path)


def _seal(path: Path, *, manifests: bool = True) -> None:
    """Recompute all checksums."""
    job = json.loads((path / "job.json").read_bytes())
    (path / CACHE_NAME).unlink()
    if manifests:
        file = path / SHARD / MANIFEST_NAME
        manifest = json.loads(file.read_bytes())
        file.unlink()
        manifest["files"] = file_entries(file.parent)
        file.write_bytes(canonical(manifest))
    CacheStore.open(path, job["fingerprint"], job["shards"]).finalise()
