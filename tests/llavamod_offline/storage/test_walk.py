"""Folders spread over several disks by links: every file found once per path, loops detected, dead links named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llavamod_offline.storage.folders import LocalFolder
from llavamod_offline.storage.walk import absence, walk_files
from teacher_cache.format.manifest import file_entries


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_links_are_followed(tmp_path: Path) -> None:
    far = fill(tmp_path / "disk2", "b", "deep/c")
    near = fill(tmp_path / "data", "a", "z/d")
    (near / "far").symlink_to(far)
    (near / "z" / "relative").symlink_to("../../disk2/deep")
    (near / "file").symlink_to(far / "b")
    (near / "gone").symlink_to("nowhere")
    assert list(walk_files(near)) == ["a", "far/b", "far/deep/c", "file", "gone", "z/d", "z/relative/c"]
    assert list(walk_files(near, lambda name: name in {"far", "d"})) == ["a", "file", "gone", "z/relative/c"]
    assert absence(near / "gone") == "a link to 'nowhere', which does not exist"
    assert absence(near / "none") == "no such file"


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "../twin"])
def test_loops_end_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str) -> None:
    """Links to the folder itself, to one above it, to one above the start, and two folders that link to each other."""
    root = fill(tmp_path / "up" / "data", "sub/a", "twin/b")
    (root / "sub" / "loop").symlink_to(target)
    (root / "sub" / "sub").symlink_to(root / "twin")
    (root / "twin" / "back").symlink_to(root / "sub")
    with caplog.at_level(logging.WARNING):
        found = list(walk_files(root))
    assert {"sub/a", "twin/b"} <= set(found)
    assert len(found) < 200
    assert any("a link to a folder that contains it: not followed" in message for message in caplog.messages)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(walk_files(tmp_path / "none"))


def test_checksums_of_a_cache_shard_cover_linked_folders(tmp_path: Path) -> None:
    far = fill(tmp_path / "disk2", "c/0")
    shard = fill(tmp_path / "shard", "sequences.arrow")
    (shard / "columns.zarr").symlink_to(far)
    assert list(file_entries(shard)) == ["columns.zarr/c/0", "sequences.arrow"]


def test_what_vanishes_meanwhile_has_no_files(tmp_path: Path) -> None:
    """As when another process renames a cache's shard into place."""
    folder = fill(tmp_path / "data", "a/1", "b/2", "c/3")
    found = []
    for name in walk_files(folder):
        found.append(name)
        if name == "a/1":
            (folder / "b").rename(tmp_path / "elsewhere")
    assert found == ["a/1", "c/3"]
    (folder / "dead").symlink_to("nowhere")
    assert LocalFolder(folder).sizes() == {"a/1": 3, "c/3": 3}
