"""A set and its cache behind a plain web server without directory listings or range requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, DataError
from llavamod_offline.storage.disk_cache import DiskCache
from teacher_cache.format.manifest import CACHE_NAME, JOB_NAME
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import World


class _Quiet(SimpleHTTPRequestHandler):
    """Serves only files, without logging."""

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder; yield its URL."""

    def handler(*arguments: object) -> _Quiet:
        return _Quiet(*arguments, directory=str(folder))  # type: ignore[arg-type]

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def served(world: World, finished: Path, tmp_path: Path) -> Iterator[str]:
    root = tmp_path / "root"
    root.mkdir()
    (root / "set").symlink_to(world.samples)
    (root / "cache").symlink_to(finished)
    (root / "unfinished").mkdir()
    (root / "unfinished" / JOB_NAME).write_bytes((finished / JOB_NAME).read_bytes())
    with serving(root) as url:
        yield url


def test_what_a_web_server_has_is_read_as_from_a_disk(
    served: str, world: World, finished: Path, tmp_path: Path
) -> None:
    staging = DiskCache(tmp_path / "staging", 10**9)
    here, there = SampleSet.open(world.samples), SampleSet.open(f"{served}/set", staging=staging)
    near, far = open_cache(finished), open_cache(f"{served}/cache", staging=staging)
    assert (there.digest, far.digest) == (here.digest, near.digest)
    assert there.read(3, scattered=True) == here.read(3)  # before its tar is copied, so reads a part of the file
    assert [there.read(row) for row in range(len(there))] == [here.read(row) for row in range(len(here))]
    rows = far.rows(there.index.column("key"), "response", there.shard_rows)
    ours, theirs = (cache.targets(rows) for cache in (near, far))
    assert np.array_equal(theirs.topk_ids_NK.numpy(), ours.topk_ids_NK.numpy())
    assert np.array_equal(theirs.target_log_probs_N.numpy(), ours.target_log_probs_N.numpy())


def test_what_a_web_server_lacks_is_named(served: str, tmp_path: Path) -> None:
    staging = DiskCache(tmp_path / "staging", 10**9)
    with pytest.raises(CacheError, match=rf"cache '{served}/set': has no {CACHE_NAME}, so it is not a teacher cache"):
        open_cache(f"{served}/set", staging=staging)
    with pytest.raises(CacheError, match=r"unfinished .*rerun `cache-teacher run`"):
        open_cache(f"{served}/unfinished", staging=staging)
    with pytest.raises(DataError, match=r"has no set\.json, so it is not a packed set"):
        SampleSet.open(f"{served}/cache", staging=staging)
