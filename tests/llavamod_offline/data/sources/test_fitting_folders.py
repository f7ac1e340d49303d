"""Where images that are missing from one folder really are, or what their files are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavamod_offline.data.sources.fitting_folders import advice_on_missing


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("llava/coco/train2017/1.jpg", "llava/gqa/images/2.jpg", "flat/1.jpg", "flat/2.jpg", "flat/3.PNG"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


NAMED = ["coco/train2017/1.jpg", "gqa/images/2.jpg"]


@pytest.mark.parametrize(
    ("names", "folder", "advice"),
    [
        (NAMED, "data/llava/coco", "try --images data/llava"),
        (NAMED, "data/llava/coco/train2017", "try --images data/llava"),
        (NAMED, "data", "try --images data/llava"),
        (NAMED, ".", "try --images data/llava"),
        (["1.jpg", "2.jpg"], "data/llava", "try --images data/llava/coco/train2017 --images data/llava/gqa/images"),
        (["x/y/1.jpg", "x/y/2.jpg"], "data/flat", "remove 'x/y/' from the rows' image names, with --images data/flat"),
        (["/home/me/1.jpg", "/home/me/2.jpg"], "data/flat",
         "remove '/home/me/' from the rows' image names, with --images data/flat"),
        (["3.jpg"], "data/flat", "the files' names end in '.PNG': write so in the rows"),
        (["coco\\train2017\\1.jpg"], "data/llava", "write / for \\ in the rows' image names"),
        (["https://example.org/1.jpg"], "data",
         "these are addresses: download the images, and name the files in the rows"),
        (["none.jpg"], "data", ""),
        (["1.jpg", "none.jpg", "none2.jpg"], "data/llava/coco", ""),
        ([], "data", ""),
    ],
)  # fmt: skip
def test_advice(data: Path, names: list[str], folder: str, advice: str) -> None:
    assert advice_on_missing(names, [Path(folder)]) == advice
