"""Training and capturing from a bucket equal those from disk, even if the network fails for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from llavamod_offline.errors import ConfigError, DataError, StorageError
from llavamod_offline.storage.folders import open_folder
from teacher_cache.read.reader import open_cache
from tests.flaky_proxy import FlakyProxy, flaky_proxy
from tests.tiny import write_tiny_set
from tests.train.conftest import World, wait_for_lines, write_cache
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from train.metrics import METRICS_NAME
from train.run import train

SETTINGS = ("steps=12", "data.window=2", "data.group_by_length=true", "data.holdout=4", "eval_steps=6")


@pytest.fixture(scope="module")
def local(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of six shards and its cache."""
    folder = tmp_path_factory.mktemp("six-shards")
    write_cache(folder / "cache", write_tiny_set(folder / "set", 24, shard_samples=4), world.teacher)
    return folder


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy through which the bucket is reached."""
    import s3fs

    with flaky_proxy(int(urlsplit(os.environ["AWS_ENDPOINT_URL"]).port or 0)) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield made


def upload(folder: Path, url: str) -> str:
    """Copy a folder into a bucket as any tool would."""
    target = open_folder(url)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        target.write(file.relative_to(folder).as_posix(), file.read_bytes())
    return url


@contextmanager
def outage(proxy: FlakyProxy, file: Path, lines: int) -> Iterator[None]:
    """Take the store away for two seconds once a log has some lines, then cut the next replies."""

    def fail() -> None:
        wait_for_lines(file, lines)
        proxy.go_away(2.0)
        proxy.cut_replies(2)

    thread = threading.Thread(target=fail)
    thread.start()
    yield
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_from_a_bucket_is_the_one_from_a_disk(
    world: World,
    local: Path,
    bucket: str,
    proxy: FlakyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """There is room for little more than a window, so that shards are fetched again and again.

    Also while the store is away, from replies that are cut short, and after a stop.
    """
    given = (f"data.set={local / 'set'}", f"cache.path={local / 'cache'}")
    train(world.config("mimic_dense", tmp_path / "local", *SETTINGS, *given))
    proxy.cut_replies(2)
    remote = (upload(local / "set", f"{bucket}/set"), upload(local / "cache", f"{bucket}/cache"))
    proxy.cut_replies(3)
    needed = sum(sorted(path.stat().st_size for path in (local / "set").glob("*.tar"))[-2:])
    needed += sum(sorted(open_cache(local / "cache").shard_bytes.values())[-2:])
    monkeypatch.setenv("LLAVAMOD_STAGING_GB", f"{1.3 * needed / 1e9:.9f}")
    there = (f"data.set={remote[0]}", f"cache.path={remote[1]}", f"workers={workers}")
    config = world.config("mimic_dense", tmp_path / "remote", *SETTINGS, *there)
    log = tmp_path / "remote" / METRICS_NAME
    with outage(proxy, log, lines=2):
        train_until_sigterm(config, lines=5)
    assert proxy.cut in (5, 6, 7)  # the last two only if anything was left to fetch
    assert train(config).finished
    assert_same_run(tmp_path / "remote", tmp_path / "local")
    staged = sum(path.stat().st_size for path in Path(os.environ["LLAVAMOD_STAGING"]).rglob("*") if path.is_file())
    assert staged <= 1.3 * needed + 1000  # lock files


@pytest.mark.slow
def test_a_capture_from_a_bucket_has_the_digest_of_the_one_from_a_disk(
    world: World, local: Path, bucket: str, proxy: FlakyProxy, tmp_path: Path
) -> None:
    remote = upload(local / "set", f"{bucket}/set")
    proxy.cut_replies(3)
    away = threading.Timer(0.3, proxy.go_away, (2.0,))
    away.start()
    cache = write_cache(tmp_path / "cache", remote, world.teacher)  # type: ignore[arg-type]
    away.join()
    assert (proxy.cut, proxy.outages) == (3, 1)
    assert open_cache(cache).digest == open_cache(local / "cache").digest


def test_a_store_that_stays_away_is_one_line(
    world: World, local: Path, bucket: str, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = upload(local / "set", f"{bucket}/set")
    monkeypatch.setenv("LLAVAMOD_RETRY_SECONDS", "0.5")
    config = world.config("sft", tmp_path / "run", f"data.set={remote}", "workers=1")
    proxy.go_away(None)
    with pytest.raises(
        StorageError, match=r"set/set\.json: cannot be read: .*: check the network and try again"
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_a_staging_folder_too_small_for_a_window_is_refused(
    world: World, local: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = upload(local / "set", f"{bucket}/set")
    monkeypatch.setenv("LLAVAMOD_STAGING_GB", "0.00003")
    with pytest.raises(
        ConfigError, match=r"data\.window: 6 shards .* raise LLAVAMOD_STAGING_GB, or lower data\.window"
    ):
        train(world.config("sft", tmp_path / "run", f"data.set={remote}"))


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_a_damaged_tar_is_refused(world: World, local: Path, bucket: str, tmp_path: Path, harm: str) -> None:
    remote = upload(local / "set", f"{bucket}/set")
    folder = open_folder(remote)
    content = bytearray(folder.read("set-000003.tar"))
    content[600] ^= 1
    folder.remove_files(["set-000003.tar"])
    if harm == "flipped":
        folder.write("set-000003.tar", bytes(content))
    with pytest.raises(DataError, match=r"shard 'set-000003': .*set-000003\.tar (is|has) .*: upload or pack it again"):
        train(world.config("sft", tmp_path / "run", f"data.set={remote}", "workers=1"))
