"""Fixtures and settings shared by the tests of several folders."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when anything imports Triton: kernels then run on a CPU
os.environ["LLAVAMOD_PROGRESS_SECONDS"] = "inf"  # only a slow machine would print progress

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.object_store import object_store

# The time to run or generate examples depends on the machine and says nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def object_store_variables() -> Iterator[dict[str, str]]:
    """The environment variables of an S3 server that runs as long as the tests do."""
    with object_store() as variables:
        yield variables


@pytest.fixture
def bucket(object_store_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new bucket; copies of its files are staged below `tmp_path`."""
    import s3fs

    for name, value in object_store_variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
