"""Tars written by any tar program give the samples of their files, whatever else they hold."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.tars.tar_index import TarSource, index_tars
from llavamod_offline.data.tars.tar_reader import TarReader
from tests.llavamod_offline.data.tars.foreign_tars import Entry, row, special, write_tar
from tests.llavamod_offline.data.tars.test_tar_index import read_all, rejected
from tests.tiny import tiny_image

PNG = tiny_image(1)
TEXT = row("<image>\nWhat?", "That.")
GNU_FORMATS = ("gnu", "oldgnu", "ustar", "posix", "v7")
PYTHON_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FOLDERS = ["", "a", "a/000", "a/b.jpg", "b.c", "001", "__MACOSX", "deep/er/still"]
KEYS = ["000", "001", "b", "README", "k" * 70]
STRAYS = ["._000.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "._b.json", "__MACOSX/000.jpg", "__MACOSX/a/._000.json"]

names = st.builds(lambda folder, key: f"{folder}/{key}".lstrip("/"), st.sampled_from(FOLDERS), st.sampled_from(KEYS))
trees = st.fixed_dictionaries(
    {
        "samples": st.sets(names.filter(lambda name: "__MACOSX" not in name), min_size=1, max_size=6),
        "strays": st.sets(st.sampled_from(STRAYS)),
        "links": st.sets(st.sampled_from(["latest", "a/again", "v1.0"])),
        "shared": st.booleans(),
    }
)


def plant(folder: Path, tree: dict[str, Any]) -> None:
    """Write the files of a tree: samples, clutter, links to folders, and images that are hard links to each other."""
    first: Path | None = None
    for name in sorted(tree["samples"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{folder / name}.json").write_bytes(TEXT)
        image = Path(f"{folder / name}.png")
        if first is not None and tree["shared"]:
            os.link(first, image)
        else:
            image.write_bytes(PNG)
            first = image
    for name in sorted(tree["strays"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\26\7")
    for name in sorted(tree["links"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(folder)


def check(tar: Path, tree: dict[str, Any], set_folder: Path) -> None:
    summary = index_tars([TarSource(tar, "s")], set_folder, keys="member")
    assert rejected(set_folder) == {}
    found = {sample.key: sample.images for sample in read_all(set_folder)}
    assert len(found) == summary.samples == len(tree["samples"])
    assert set(found.values()) == {(PNG,)}


@settings(max_examples=20)
@given(tree=trees, form=st.sampled_from(GNU_FORMATS), dotted=st.booleans(), twice=st.booleans())
def test_gnu_tar(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], form: str, dotted: bool, twice: bool
) -> None:
    folder = tmp_path_factory.mktemp("gnu")
    (folder / "data").mkdir()
    plant(folder / "data", tree)
    members = ["."] if dotted else sorted(os.listdir(folder / "data"))
    command = ["tar", "--sort=name", f"--format={form}", "-cf", str(folder / "x.tar")]
    done = subprocess.run([*command, *members, *members * twice], cwd=folder / "data", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    check(folder / "x.tar", tree, folder / "set")


@settings(max_examples=20)
@given(tree=trees, form=st.sampled_from(PYTHON_FORMATS), prefix=st.sampled_from(["", "./", "x//y/./"]))
def test_python_tar(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], form: int, prefix: str) -> None:
    folder = tmp_path_factory.mktemp("python")
    (folder / "data").mkdir()
    plant(folder / "data", tree)
    with tarfile.open(folder / "x.tar", "w", format=form) as tar:
        if form == tarfile.PAX_FORMAT:
            tar.pax_headers = {"comment": "of the whole archive"}
        for path in sorted((folder / "data").rglob("*"), key=lambda path: str(path).rpartition("/")):
            header = tar.gettarinfo(path, arcname=prefix + path.relative_to(folder / "data").as_posix())
            with path.open("rb") if header.isreg() else open(os.devnull, "rb") as content:
                tar.addfile(header, content)
    check(folder / "x.tar", tree, folder / "set")


def test_a_hard_link_holds_the_bytes_of_its_target(tmp_path: Path) -> None:
    links = special(".//b.png", tarfile.LNKTYPE, "a.png"), special("c.png", tarfile.LNKTYPE, "b.png")
    entries: list[Entry] = [("a.json", TEXT), ("./a.png", PNG), ("b.json", TEXT), links[0], ("c.json", TEXT), links[1]]
    index_tars([TarSource(write_tar(tmp_path / "x.tar", entries), "s")], tmp_path / "set")
    assert [(sample.key, sample.images) for sample in read_all(tmp_path / "set")] == [(k, (PNG,)) for k in "abc"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"V", b"D", tarfile.DIRTYPE])
def test_what_is_no_file_and_not_named_as_one_is_passed_over(tmp_path: Path, kind: bytes) -> None:
    """Volume labels, folders of incremental backups and links to folders, even between the members of a sample."""
    tar = write_tar(tmp_path / "x.tar", [("a.json", TEXT), special("label", kind, "a"), ("a.png", PNG)])
    reader = TarReader(tar)
    assert [(group.key, sorted(group.members)) for group in reader.groups()] == [("a", ["json", "png"])]
    assert reader.problem is None


def test_dots_in_the_names_of_tars(tmp_path: Path) -> None:
    entries = [("Shot 1.32.11.json", TEXT), ("Shot 1.32.11.png", PNG), ("a.json", row("?", "A"))]
    tar = write_tar(tmp_path / "x.tar", entries)
    index_tars([TarSource(tar, "s")], tmp_path / "set")
    [(kind, reason)] = rejected(tmp_path / "set").values()
    assert kind == "bad member"
    assert "its name has dots: in a tar, a key ends at the first dot" in reason
    assert "--ignore" not in reason
