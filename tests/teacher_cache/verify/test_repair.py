"""`verify --repair` removes what is damaged and no more; the next run restores the undamaged cache's bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import CacheError, LlavaModError
from llavamod_offline.storage.folders import Folder, open_folder
from teacher_cache.cli.main import app
from teacher_cache.format.manifest import (
    CACHE_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    canonical,
    file_entries,
)
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.verify.repair import repair_cache, repair_lines
from tests.teacher_cache.capture.driver import NAMES, write_cache
from tests.teacher_cache.conftest import World


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged cache of two shards; tests must not change it."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    write_cache(path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flip(folder: Folder, name: str, generator: np.random.Generator) -> None:
    """Flip one random bit of a file."""
    content = bytearray(folder.read(name))
    content[int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
    folder.write(name, bytes(content))


def names_in(path: Path) -> list[str]:
    """The names of a cache's non-empty files."""
    return sorted(name for name, size in open_folder(path).sizes().items() if size)


@pytest.mark.slow
def test_every_flipped_bit_is_found_and_named(whole: Path, copy: Path) -> None:
    """More than 200 flips, cycling through all files."""
    generator = np.random.default_rng(0)
    names = names_in(copy)
    assert len(names) > 20
    flips = 0
    while flips < 210:
        for name in names:
            flip(open_folder(copy), name, generator)
            damage = verify_cache(copy).damage
            assert any(problem.startswith(f"{name}: ") for problem in damage), (name, damage)
            shutil.copyfile(whole / name, copy / name)
            flips += 1
    assert verify_cache(copy).ok


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_repaired(whole: Path, copy: Path) -> None:
    generator = np.random.default_rng(1)
    expected = file_entries(whole)
    for name in names_in(copy):
        flip(open_folder(copy), name, generator)
        done = repair_cache(copy)
        shard = name.split("/")[1] if "/" in name else None
        assert done.shards == ([shard] if shard else [])
        if name == JOB_NAME:
            assert (done.restored, done.removed) == ([JOB_NAME], [])
        elif shard:
            assert done.removed == [CACHE_NAME, REJECTED_NAME, f"shards/{shard}"]
        else:
            assert done.removed == [CACHE_NAME, REJECTED_NAME]
        assert any(problem.startswith(f"{name}: ") for problem in done.damage)
        write_cache(copy)
        assert file_entries(copy) == expected
        assert verify_cache(copy).ok


def test_only_the_damaged_shards_are_made_again(world: World, finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "c"))
    for shard in ("samples-000001", "samples-000003"):
        (path / "shards" / shard / SEQUENCES_NAME).unlink()
    assert repair_cache(path).shards == ["samples-000001", "samples-000003"]
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(path)
    assert world.run(path).sequences == 10
    assert file_entries(path) == file_entries(finished)


def test_a_sound_cache_is_left_as_it_is(copy: Path, whole: Path) -> None:
    done = repair_cache(copy)
    assert (done.damage, done.restored, done.removed, done.left, done.shards) == ([], [], [], [], [])
    assert repair_lines("c", done) == ["c: intact"]
    assert file_entries(copy) == file_entries(whole)


def test_strays_and_leftovers_go_and_what_is_beside_stays(copy: Path, whole: Path) -> None:
    (copy / "notes.md").write_text("mine")
    (copy / "shards" / NAMES[0] / "extra").write_text("x")
    shutil.copytree(copy / "shards" / NAMES[0], copy / "shards" / "other")
    (copy / "shards" / "loose.txt").write_text("x")
    for leftover in (f"shards/.{NAMES[1]}.999999999.tmp", ".cache.json.999999999.tmp"):
        (copy / leftover).mkdir()
    strays = [f"shards/{NAMES[0]}/extra", "shards/loose.txt", "shards/other"]
    assert sorted(verify_cache(copy).damage) == sorted(f"{stray}: not part of the cache" for stray in strays)
    done = repair_cache(copy)
    assert set(done.removed) == {*strays, f"shards/.{NAMES[1]}.999999999.tmp", ".cache.json.999999999.tmp"}
    assert (done.left, done.shards) == (["notes.md"], [])
    assert "left alone, not part of the cache: notes.md" in repair_lines("c", done)
    assert verify_cache(copy).ok
    assert {**file_entries(copy)}.keys() - file_entries(whole).keys() == {"notes.md"}


@pytest.mark.parametrize("harm", ["flipped", "spaced", "renamed", "no files"])
def test_an_unfinished_cache_is_repaired_too(copy: Path, whole: Path, harm: str) -> None:
    (copy / CACHE_NAME).unlink()
    shutil.rmtree(copy / "shards" / NAMES[0])
    file = copy / "shards" / NAMES[1] / MANIFEST_NAME
    manifest = json.loads(file.read_bytes())
    if harm == "flipped":
        flip(open_folder(copy), file.relative_to(copy).as_posix(), np.random.default_rng(0))
    elif harm == "spaced":
        file.write_bytes(file.read_bytes() + b"\n")
    else:
        field, value = ("name", "other") if harm == "renamed" else ("files", {})
        file.write_bytes(canonical({**manifest, field: value}))
    done = repair_cache(copy)
    assert done.shards == NAMES[:2]
    assert done.removed[:2] == [REJECTED_NAME, f"shards/{NAMES[1]}"]
    write_cache(copy)
    assert file_entries(copy) == file_entries(whole)


def test_without_cache_json_a_damaged_job_has_no_way_back(copy: Path, whole: Path) -> None:
    """Nothing is removed on the strength of a file that may name other shards."""
    (copy / CACHE_NAME).unlink()
    generator = np.random.default_rng(0)
    for _ in range(20):
        shutil.copyfile(whole / JOB_NAME, copy / JOB_NAME)
        flip(open_folder(copy), JOB_NAME, generator)
        before = file_entries(copy)
        with pytest.raises(CacheError, match=r"job.json: damaged or missing.*put back a copy of either") as caught:
            repair_cache(copy)
        assert "\n" not in str(caught.value)
        assert file_entries(copy) == before
        with pytest.raises(CacheError, match=r"job.json: .*run `cache-teacher verify --repair`|format version"):
            write_cache(copy)


@pytest.mark.parametrize("harm", ["missing", "short", "foreign"])
def test_a_damaged_job_is_restored_from_cache_json(copy: Path, whole: Path, harm: str) -> None:
    file = copy / JOB_NAME
    if harm == "missing":
        file.unlink()
    elif harm == "short":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        job = json.loads(file.read_bytes())
        file.write_bytes(json.dumps(job | {"shards": []}).encode())
    assert any(problem.startswith("job.json: ") for problem in verify_cache(copy).damage)
    assert repair_cache(copy).restored == [JOB_NAME]
    assert file_entries(copy) == file_entries(whole)


def test_a_cache_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match="it is not a cache"):
        repair_cache(tmp_path)
    with pytest.raises(CacheError, match="no such folder"):
        repair_cache(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "name", [f"shards/{NAMES[0]}/{SEQUENCES_NAME}", f"shards/{NAMES[0]}/{MANIFEST_NAME}", CACHE_NAME]
)
def test_a_bucket_is_verified_and_repaired(bucket: str, whole: Path, name: str) -> None:
    where = f"{bucket}/c"
    digest = write_cache(where)
    assert digest == open_cache(whole).digest
    assert verify_cache(where).ok
    folder = open_folder(where)
    folder.write(f"shards/{NAMES[0]}/extra", b"x")
    folder.write("shards/other/file", b"x")
    flip(folder, name, np.random.default_rng(0))
    verdict = verify_cache(where)
    assert not verdict.ok
    assert {problem.partition(":")[0] for problem in verdict.damage} >= {name, "shards/other"}
    done = repair_cache(where)
    assert done.shards == ([NAMES[0]] if "/" in name else [])
    assert "shards/other" in done.removed
    assert write_cache(where) == digest
    assert verify_cache(where).ok
    assert folder.sizes() == open_folder(whole).sizes()


def test_a_disk_that_refuses_is_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (copy / "shards" / NAMES[0] / SEQUENCES_NAME).unlink()
    monkeypatch.setattr("llavamod_offline.storage.folders.LocalFolder.remove_files", refuse)
    with pytest.raises(LlavaModError, match="cannot be repaired: Permission denied"):
        repair_cache(copy)


def test_the_command_says_what_it_removed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(app, ["verify", str(copy), *argv])
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr().out

    (copy / "shards" / NAMES[1] / SEQUENCES_NAME).unlink()
    before = file_entries(copy)
    assert call()[0] == 1
    assert file_entries(copy) == before  # read-only without --repair
    status, out = call("--repair")
    assert status == 0
    assert out.splitlines() == [
        f"found: shards/{NAMES[1]}/{SEQUENCES_NAME}: missing",
        f"removed: {CACHE_NAME}",
        f"removed: {REJECTED_NAME}",
        f"removed: shards/{NAMES[1]}",
        f"{copy}: run `cache-teacher run` with the same settings to write 1 missing shard, {CACHE_NAME} and "
        f"{REJECTED_NAME}",
    ]
    write_cache(copy)
    status, out = call("--repair", "--json")
    assert status == 0
    assert json.loads(out) == {
        **{part: [] for part in ("damage", "restored", "removed", "left", "shards")},
        "finish": "`cache-teacher run` with the same settings",
    }
