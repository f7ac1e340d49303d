"""Folders of photographs as people have them: dots in names, links to other disks, operating-system files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.data.rows import Located, RejectedRow
from llavamod_offline.data.sources.source import Source
from llavamod_offline.data.tars.tar_index import find_tars
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.sources.source_files import JPG, PNG, read_sources
from tests.llavamod_offline.data.tars.foreign_tars import row, write_tar
from tests.tiny import tiny_image

RULE = ReadRule(caption_prompt="Describe it.")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> tuple[dict[str, tuple[bytes, ...]], list[RejectedRow]]:
    """The images of each answer, and the rejections."""
    found = list(read_sources([Source(folder, rule=RULE)]))
    samples = {row.sample.turns[-1].text: row.sample.images for row in found if isinstance(row, Located)}
    return samples, [row for row in found if isinstance(row, RejectedRow)]


stems = st.text(st.sampled_from("ab1.0 -"), min_size=1, max_size=8).filter(
    lambda text: text.strip(". ") == text and ".." not in text
)


@given(stems=st.sets(stems, min_size=1, max_size=6))
def test_names_with_dots(tmp_path_factory: pytest.TempPathFactory, stems: set[str]) -> None:
    files = {f"{stem}.jpg": tiny_image(number, format="JPEG") for number, stem in enumerate(sorted(stems))}
    captions = {f"{stem}.txt": stem.encode() for stem in stems}
    samples, rejections = read(write(tmp_path_factory.mktemp("photos"), files | captions))
    assert not rejections
    assert samples == {stem: (files[f"{stem}.jpg"],) for stem in stems}


def test_numbered_images_beside_names_with_dots(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "mine",
        {
            "v1.2/two.0.jpg": JPG,
            "v1.2/two.1.png": PNG,
            "v1.2/two.json": row("<image> or <image>?", "Both."),
            "Shot 10.32.11.jpg": JPG,
            "Shot 10.32.11.txt": b"A shot.",
            "10.0.jpg": PNG,
            "10.0.txt": b"A whole ten.",
        },
    )
    samples, rejections = read(folder)
    assert not rejections
    assert samples == {"Both.": (JPG, PNG), "A shot.": (JPG,), "A whole ten.": (PNG,)}


def test_files_of_the_operating_system_are_no_samples(tmp_path: Path) -> None:
    junk = ["._a.jpg", ".DS_Store", "Thumbs.db", "DESKTOP.INI", "__MACOSX/._a.txt", "@eaDir/a.jpg/SYNOPHOTO_THUMB.jpg",
            ".ipynb_checkpoints/a-checkpoint.jpg", ".cache/huggingface/a.jpg.metadata", ".git/config"]  # fmt: skip
    folder = write(tmp_path / "mine", {"a.jpg": JPG, "a.txt": b"A."} | dict.fromkeys(junk, b"x"))
    assert read(folder) == ({"A.": (JPG,)}, [])


def test_linked_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", {"a.jpg": JPG, "a.txt": b"A."})
    far = write(tmp_path / "disk2", {"part2/b.jpg": PNG, "part2/b.txt": b"B."})
    (folder / "part2").symlink_to("../disk2/part2")
    (far / "part2" / "up").symlink_to(folder)
    (folder / "part3").symlink_to("../disk3/part3")
    samples, [lost] = read(folder)
    assert samples == {"A.": (JPG,), "B.": (PNG,)}
    assert (lost.key, lost.kind) == ("part3", "missing image")
    assert lost.reason == "file 'part3': a link to '../disk3/part3', which does not exist"


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"a.jpg": JPG, "a.txt": b"A."})
    os.mkfifo(folder / "b.jpg")
    samples, [pipe] = read(folder)
    assert (list(samples), pipe.reason) == (["A."], "file 'b.jpg': not a plain file")


def test_tars_further_down_belong_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "mine", {"a.jpg": JPG, "a.txt": b"A.", "deep/x.tar": b""})
    with pytest.raises(DataError, match=r"holds 'deep/x\.tar': index tars in place with `llavamod-offline index`"):
        read(tmp_path / "mine")


def test_tars_on_other_disks(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    near = write_tar(tars / "here" / "a.tar", [("a.json", row("?", "A."))])
    write_tar(tmp_path / "disk2" / "b.tar", [("b.json", row("?", "B."))])
    (tars / "more").symlink_to("../disk2")
    (tars / "here" / "loop").symlink_to(tars)
    assert [source.path for source in find_tars([tars])] == [near, tars / "more" / "b.tar"]
    (tars / "rest").symlink_to("../disk3")
    with pytest.raises(DataError, match=r"rest': a link to '\.\./disk3', which does not exist: remove it, or restore"):
        find_tars([tars])
    (tars / "rest").unlink()
    (tars / "c.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.tar\.gz': is compressed, which rules out reading by position: unpack it"):
        find_tars([tars])


def test_a_rejection_names_the_file(tmp_path: Path) -> None:
    """Since keys are row numbers, only the file's name leads back to it."""
    write(tmp_path / "mine", {"deep/a.jpg": b"broken", "deep/a.txt": b"A circle.", "b.jpg": JPG, "b.txt": b"A shot."})
    found = list(read_sources([Source(tmp_path / "mine", rule=RULE)], keys="row"))
    rejections = [(row.file, row.kind) for row in found if isinstance(row, RejectedRow)]
    assert rejections == [(str(tmp_path / "mine" / "deep" / "a.jpg"), "undecodable image")]
