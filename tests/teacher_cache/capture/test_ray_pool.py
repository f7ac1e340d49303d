"""A capture on a local Ray cluster: the same cache as without Ray, whichever worker dies, and only our own output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample
from teacher_cache.capture.ray_pool import RayPool
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.format.manifest import file_entries
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import World
from tests.teacher_cache.ray_cluster import in_a_process
from tests.tiny import tiny_samples

RUN = "from teacher_cache.cli.main import main; main()"
MORTAL = "from tests.teacher_cache.capture.ray_driver import main; main()"
ON_RAY = ("engine.ray=true", "engine.ray_workers=2")

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use as many threads here as a worker does: the last digits of a product on a CPU depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_workers_make_the_cache_of_one_process(world: World, tmp_path: Path) -> None:
    """With an image that cannot be read, and shards that another slice has already captured."""
    samples = tiny_samples(10)
    broken = Sample("broken", samples[0].turns, (b"no picture",), ("png",))
    write_set([*samples[:3], broken, *samples[3:]], tmp_path / "set", shard_samples=3)
    alone = world.run(tmp_path / "alone", data=tmp_path / "set")
    world.run(tmp_path / "c", "slice=0/3", data=tmp_path / "set")
    done = in_a_process(RUN, "run", *world.arguments(tmp_path / "c", *ON_RAY, "workers=1", data=tmp_path / "set"))
    assert done.returncode == 3, done.stderr
    assert f"digest {alone.digest}" in done.stdout
    assert "rejected 1: " in done.stdout
    assert "(broken)" in done.stdout
    assert file_entries(tmp_path / "c") == file_entries(tmp_path / "alone")
    *lines, waited = done.stderr.splitlines()
    assert lines == [f"{tmp_path}/c: 2 of 4 shards to capture", "ray: 2 workers"]
    assert waited.startswith(f"{tmp_path}/c: the teacher waited ")


def test_workers_that_are_killed_amid_a_shard_change_nothing(world: World, finished: Path, tmp_path: Path) -> None:
    """One shard kills only its first worker and is then captured; one kills every worker, and is named."""
    done = in_a_process(MORTAL, "samples-000002", "samples-000003", *world.arguments(tmp_path / "c", *ON_RAY))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["samples"] == 24 - 5
    assert said["error"].startswith("shard 'samples-000003': 3 workers died with it: ")
    assert "rerun to resume" in said["error"]
    died = [(tmp_path / f"died-of-samples-{number:06d}").read_text().split() for number in (2, 3)]
    assert [len(processes) for processes in died] == [1, 3]
    assert len({*died[0], *died[1]}) == 4
    summary = world.run(tmp_path / "c")
    assert (summary.sequences, summary.digest) == (5, open_cache(finished).digest)


def test_a_disk_that_refuses_a_worker_is_one_line(world: World, finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "c"))
    shutil.rmtree(output / "shards")
    (output / "shards").symlink_to("/proc")  # in which no one can create a folder
    done = in_a_process(RUN, "run", *world.arguments(output, *ON_RAY))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {output}/shards/samples-00000")
    assert "cannot be written: " in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("device=cuda:1",), "set device=cuda"),
        (("teacher=nowhere",), "nowhere"),
    ],
)
def test_bad_settings_are_found_before_a_cluster_is_started(
    world: World, tmp_path: Path, settings: tuple[str, ...], words: str
) -> None:
    done = in_a_process(RUN, "run", *world.arguments(tmp_path / "c", *ON_RAY, *settings))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr
    assert not (tmp_path / "c").exists()


def test_a_cluster_that_does_not_answer_is_one_line(world: World, tmp_path: Path) -> None:
    done = in_a_process(RUN, "run", *world.arguments(tmp_path / "c", *ON_RAY), address="127.0.0.1:1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ray: no cluster at 127.0.0.1:1: ")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("settings", "device", "gpus"),
    [
        (("device=cpu",), "cpu", 0.0),
        (("device=cuda",), "cuda", 1.0),
        (("device=cuda", "engine.gpus_per_worker=0.5"), "cuda", 0.5),
        (("device=cuda", "engine.kind=vllm", "engine.vllm.tensor_parallel=4"), "cuda", 4.0),
        (("device=cuda", "engine.kind=vllm", "engine.vllm.pipeline_parallel=2"), "cuda", 2.0),
    ],
)
def test_a_workers_share_follows_from_device_and_engine(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], device: str, gpus: float
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(CacheTeacherConfig, (), world.arguments(tmp_path / "c", *ON_RAY, *settings))
    share = config.engine.gpus_per_worker
    with RayPool(config.setup_values, config.output, (), workers=None, cpus=1, gpus=share) as pool:
        assert (pool.values["device"], pool.gpus) == (device, gpus)
