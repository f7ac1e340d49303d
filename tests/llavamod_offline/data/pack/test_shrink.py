"""Pictures made smaller: those that are too large, and no other byte."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamod_offline.data.images import decode_image, image_extension
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.pack.shrink import shrink_image, shrink_sample
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources.read import prepare_sources
from tests.tiny import tiny_image

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def smooth(width: int, height: int, kind: str = "PNG", **settings: object) -> bytes:
    """A gradient, which every way of making it smaller keeps."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    array = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=kind, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(("size", "smaller"), [((90, 60), (30, 20)), ((60, 90), (20, 30)), ((31, 31), (30, 30))])
def test_the_longer_side_fits(extension: str, size: tuple[int, int], smaller: tuple[int, int]) -> None:
    encoded = smooth(*size, FORMATS[extension])
    found, original = shrink_image(encoded, extension, 30)
    assert original == size
    assert image_extension(found, name="x") == extension
    decoded = np.asarray(decode_image(found, name="x")).astype(int)
    assert decoded.shape == (smaller[1], smaller[0], 3)
    expected = np.asarray(Image.open(io.BytesIO(smooth(*smaller)))).astype(int)
    assert np.abs(decoded - expected).mean() < 5  # a turned or shifted gradient is off by tens
    assert shrink_image(encoded, extension, 30)[0] == found


@pytest.mark.parametrize("size", [(30, 30), (30, 7), (1, 1)])
def test_what_fits_keeps_its_bytes(size: tuple[int, int]) -> None:
    encoded = smooth(*size)
    assert shrink_image(encoded, "png", 30) == (encoded, None)


@pytest.mark.parametrize(("size", "smaller"), [((150, 1), (30, 1)), ((1, 150), (1, 30))])
def test_a_side_never_vanishes(size: tuple[int, int], smaller: tuple[int, int]) -> None:
    found, original = shrink_image(smooth(*size), "png", 30)
    assert original == size
    assert decode_image(found, name="x").size == smaller


def test_orientation_is_settled_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    encoded = smooth(80, 40, "JPEG", exif=exif)
    found, original = shrink_image(encoded, "jpg", 20)
    assert original == (40, 80)
    assert decode_image(found, name="x").size == (10, 20)


def test_packing_says_what_it_made_smaller(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    small, large = tiny_image(0, (20, 20)), smooth(60, 30)
    (tmp_path / "p" / "s.png").write_bytes(small)
    (tmp_path / "p" / "l.png").write_bytes(large)
    said = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "Two."}]
    rows = [{"id": name, "image": [name, "s.png"], "conversations": said} for name in ("l.png", "s.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepared = prepare_sources([tmp_path / "rows.json"], images=[tmp_path / "p"], max_side=24)
    summary = write_set(prepared, tmp_path / "set", max_side=24)
    packed = SampleSet.open(tmp_path / "set")
    first, second = (packed.read(row, verify=True) for row in range(2))
    assert [decode_image(image, name="x").size for image in first.images] == [(24, 12), (20, 20)]
    assert first.images[1] == small
    assert second.images == (small, small)
    assert (summary.shrunk, packed.manifest["max_side"], packed.manifest["shrunk"]) == (1, 24, 1)
    assert packed.index.column("n_shrunk").to_pylist() == [1, 0]
    texts = [packed.tars.read(0, e["members"][0]["offset"], e["members"][0]["size"]) for e in packed.index.to_pylist()]
    assert json.loads(texts[0])["original_sizes"] == [[60, 30], None]
    assert "original_sizes" not in json.loads(texts[1])


def test_a_sample_that_fits_is_the_same() -> None:
    turns = (Turn("user", "<image>"), Turn("assistant", "One."))
    sample = Sample("k", turns, (smooth(30, 20),), ("png",))
    assert shrink_sample(sample, 30) == (sample, ())
