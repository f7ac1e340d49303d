"""A cache in a bucket equals the one on disk: written by several jobs, read through staged copies, damage found."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from llavamod_offline.errors import CacheError, StorageError
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.folders import open_folder
from teacher_cache.format.columns import ColumnFile
from teacher_cache.format.manifest import CACHE_NAME, MANIFEST_NAME, file_entries
from teacher_cache.read.reader import TeacherCache, open_cache
from tests.teacher_cache.capture.driver import NAMES, write_cache
from tests.teacher_cache.conftest import World

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-c", "from teacher_cache.cli.main import main; main()"]


class Answers(Dataset[list[float]]):
    """One sequence per item, from any shard."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self.keys = sorted(cache.keys("response"), key=lambda key: key[::-1])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> list[float]:
        item = (self.keys[index], "response")
        assert item in self.cache
        return [self.cache.sequence(*item).sum_log_prob, *self.cache.targets([item]).target_log_probs_N.tolist()]


@pytest.fixture
def remote(bucket: str, finished: Path) -> str:
    """The finished cache of a real capture, copied into a bucket as any tool would do."""
    where = f"{bucket}/caches/captions"
    folder = open_folder(where)
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        folder.write(file.relative_to(finished).as_posix(), file.read_bytes())
    return where


def staged_units(kind: str, folder: Path | None = None) -> list[Path]:
    """The staged units of one kind."""
    staged = (folder or Path(os.environ["LLAVAMOD_STAGING"])).glob(f"{kind}-*")
    return sorted(path for path in staged if path.is_dir())


def test_two_jobs_write_into_one_bucket_what_one_writes_on_a_disk(bucket: str, tmp_path: Path) -> None:
    digest = write_cache(tmp_path / "c", shards=4)
    where = f"{bucket}/deep/c"
    assert write_cache(where, shards=4, part=(1, 2)) is None
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(where)
    assert write_cache(where, shards=4, part=(0, 2)) == digest
    folder = open_folder(where)
    local = file_entries(tmp_path / "c")
    assert folder.sizes() == {name: entry["bytes"] for name, entry in local.items()}
    assert all(folder.read(name) == (tmp_path / "c" / name).read_bytes() for name in local)
    assert write_cache(where, shards=4) == digest  # nothing to do


@pytest.mark.slow
def test_the_command_in_two_slices_at_once_gives_the_digest_of_the_disk(
    world: World, finished: Path, bucket: str
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "run", *world.arguments(Path("unused")), f"output={bucket}/c", "--slice"]
    jobs = [
        subprocess.Popen([*command, part], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for part in ("0/2", "1/2")
    ]
    printed = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    digest = open_cache(finished).digest
    assert open_cache(f"{bucket}/c").digest == digest
    assert sum(digest in text for text in printed) >= 1
    verified = subprocess.run([*COMMAND, "verify", f"{bucket}/c"], env=environment, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    assert f"{bucket}/c: intact: 5 shards, 24 sequences" in verified.stdout


def test_it_reads_as_on_a_disk_and_stages_only_what_is_read(remote: str, finished: Path) -> None:
    local, cache = open_cache(finished), open_cache(remote)
    assert (cache.digest, cache.bytes, cache.fingerprint) == (local.digest, local.bytes, local.fingerprint)
    assert cache.path == remote
    assert cache.keys("response") == local.keys("response")
    assert cache.manifests() == local.manifests()
    assert staged_units("columns") == []
    items = [(f"tiny-{number:04d}", "response") for number in (1, 0, 7)]
    for name in ("topk_ids_NK", "topk_log_probs_NK", "tail_weights_NM", "log_normalisers_NS"):
        assert torch.equal(getattr(cache.targets(items), name), getattr(local.targets(items), name))
    assert len(staged_units("columns")) == 2
    assert cache.sequence("tiny-0023", "response") == local.sequence("tiny-0023", "response")
    assert len(staged_units("columns")) == 2
    assert len(staged_units("tables")) == 1


def test_the_tail_profile_takes_no_columns(remote: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small arrays of each shard are read and checked, and only once: the sum is kept on this machine."""
    local = open_cache(finished).tail_profile
    assert local is not None
    sums_V = np.zeros(len(local))
    for shard in open_cache(finished)._shards:
        file = ColumnFile(finished / "shards" / shard["name"] / "columns.zarr")
        sums_V += int(shard["positions"]) * file.tail_profile()
    assert torch.equal(local, torch.from_numpy(sums_V / sums_V.sum()).float())
    folder = open_folder(remote)
    name = "shards/samples-000001/columns.zarr/tail_profile/zarr.json"
    content = folder.read(name)
    folder.write(name, content.replace(b"float32", b"float64"))
    with pytest.raises(CacheError, match=f"{name}: damaged .*cache-teacher verify"):
        _ = open_cache(remote).tail_profile
    folder.write(name, content)
    found = open_cache(remote).tail_profile
    assert found is not None
    assert torch.equal(found, local)
    assert staged_units("columns") == []
    folder.remove_files([name])
    again = open_cache(remote).tail_profile
    assert again is not None
    assert torch.equal(again, local)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_share_a_small_space(remote: str, finished: Path, tmp_path: Path, method: str) -> None:
    """Two workers and this process read five shards through a staging area with room for about two."""
    expected = [Answers(open_cache(finished))[index] for index in range(24)]
    sizes = [shard["bytes"] for shard in open_cache(remote)._shards]
    staging = DiskCache(tmp_path / "small", 2 * max(sizes))
    dataset = Answers(open_cache(remote, staging=staging))
    assert [dataset[index] for index in (0, 23)] == [expected[0], expected[23]]  # connected before the fork
    context = multiprocessing.get_context(method)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert list(loader) == expected
    staged = sum(path.stat().st_size for path in staging.folder.rglob("*") if path.is_file())
    assert staged <= staging.limit_bytes + 1000  # for lock files
    assert len(staged_units("columns", staging.folder)) == 2


def test_a_shard_is_fetched_once_and_again_after_it_had_to_leave(remote: str, tmp_path: Path) -> None:
    sizes = [shard["bytes"] for shard in open_cache(remote)._shards]
    staging = DiskCache(tmp_path / "small", max(sizes))
    cache = open_cache(remote, staging=staging)
    again = pickle.loads(pickle.dumps(cache))
    for number in (0, 7, 12, 0, 7):
        item = [(f"tiny-{number:04d}", "response")]
        assert torch.equal(cache.targets(item).topk_ids_NK, again.targets(item).topk_ids_NK)
    with pytest.raises(StorageError, match="exceed the limit of 100: raise LLAVAMOD_STAGING_GB"):
        open_cache(remote, staging=DiskCache(tmp_path / "tiny", 100))


@pytest.mark.parametrize("harm", ["flipped", "missing"])
@pytest.mark.parametrize("name", ["columns.zarr/id_codes/zarr.json", MANIFEST_NAME])
def test_a_damaged_shard_is_refused_when_it_is_read(remote: str, name: str, harm: str) -> None:
    folder = open_folder(remote)
    full = f"shards/samples-000000/{name}"
    content = bytearray(folder.read(full))
    content[len(content) // 2] ^= 1
    folder.remove_files([full])
    if harm == "flipped":
        folder.write(full, bytes(content))
    cache = open_cache(remote)
    with pytest.raises(CacheError, match=f"{name}.*cache-teacher verify") as caught:
        cache.targets([("tiny-0000", "response")])
    assert "\n" not in str(caught.value)
    assert staged_units("columns") == []
    assert len(cache.targets([("tiny-0007", "response")])) > 0


def test_a_damaged_table_is_refused_when_opening(remote: str) -> None:
    folder = open_folder(remote)
    name = "shards/samples-000002/sequences.arrow"
    content = bytearray(folder.read(name))
    content[content.index(b"tiny-00")] ^= 1
    folder.write(name, bytes(content))
    with pytest.raises(CacheError, match=f"{name}: damaged .*cache-teacher verify"):
        open_cache(remote)


def test_a_shard_that_lost_a_file_or_its_manifest_is_made_again(bucket: str, tmp_path: Path) -> None:
    where = f"{bucket}/c"
    digest = write_cache(where)
    folder = open_folder(where)
    sizes = folder.sizes()
    for name in (MANIFEST_NAME, "sequences.arrow"):
        folder.remove_files([f"shards/{NAMES[0]}/{name}"])
        assert write_cache(where) == digest
        assert folder.sizes() == sizes


def test_two_writers_of_one_shard_are_found_out(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one commits different numbers while we upload."""
    from llavamod_offline.storage.remote import RemoteFolder

    folder = open_folder(f"{bucket}/c")
    create = RemoteFolder.create

    def too_late(self: RemoteFolder, name: str, content: bytes) -> bool:
        if name.endswith(MANIFEST_NAME):
            folder.write(f"{name}", b"{}")
        return create(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "create", too_late)
        with pytest.raises(
            CacheError, match=r"s-0: two processes wrote it at the same time: run `cache-teacher verify --repair`"
        ):
            write_cache(f"{bucket}/c")
    assert write_cache(f"{bucket}/c") == write_cache(f"{bucket}/d")


@pytest.mark.parametrize("where", ["missing", "empty", "else"])
def test_what_is_no_cache_is_one_line(bucket: str, where: str) -> None:
    url = f"{bucket}-none/c" if where == "missing" else f"{bucket}/c"
    if where == "else":
        open_folder(url).write("thesis.txt", b"mine")
        with pytest.raises(CacheError, match="is not a teacher cache: choose another output"):
            write_cache(url)
    reason, error = ("no such bucket", StorageError) if where == "missing" else ("not a teacher cache", CacheError)
    with pytest.raises(error, match=reason) as caught:
        open_cache(url)
    assert "\n" not in str(caught.value)
    if where == "missing":
        with pytest.raises(StorageError, match="no such bucket"):
            write_cache(url)


def test_a_cache_in_memory_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))
    where = f"memory://{tmp_path.name}/c"
    assert write_cache(where) == write_cache(tmp_path / "c")
    assert len(open_cache(where).targets([(f"{NAMES[1]}-2", "response")])) == 2
    assert CACHE_NAME in open_folder(where).names()
