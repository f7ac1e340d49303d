"""Shrinking images: those that are too large, and no other byte changes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamod_offline.data import images
from llavamod_offline.data.images import decode_image, image_extension
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.pack.shrink import shrink_image, shrink_sample
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.data.sources.source import Source
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import ConfigError, DataError
from tests.tiny import tiny_image

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def smooth(width: int, height: int, kind: str = "PNG", **settings: object) -> bytes:
    """A gradient, which every way of resizing preserves."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    array = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=kind, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(("size", "smaller"), [((90, 60), (30, 20)), ((60, 90), (20, 30)), ((31, 31), (30, 30))])
def test_the_longer_side_fits(extension: str, size: tuple[int, int], smaller: tuple[int, int]) -> None:
    encoded = smooth(*size, FORMATS[extension])
    found, original = shrink_image(encoded, extension, 30, name="k")
    assert original == size
    assert image_extension(found, name="x") == extension
    decoded = np.asarray(decode_image(found, name="x")).astype(int)
    assert decoded.shape == (smaller[1], smaller[0], 3)
    expected = np.asarray(Image.open(io.BytesIO(smooth(*smaller)))).astype(int)
    assert np.abs(decoded - expected).mean() < 5  # a rotated or shifted gradient would be off by tens
    assert shrink_image(encoded, extension, 30, name="k")[0] == found


@pytest.mark.parametrize("size", [(30, 30), (30, 7), (1, 1)])
def test_what_fits_keeps_its_bytes(size: tuple[int, int]) -> None:
    encoded = smooth(*size)
    assert shrink_image(encoded, "png", 30, name="k") == (encoded, None)


@pytest.mark.parametrize(("size", "smaller"), [((150, 1), (30, 1)), ((1, 150), (1, 30))])
def test_a_side_never_vanishes(size: tuple[int, int], smaller: tuple[int, int]) -> None:
    found, original = shrink_image(smooth(*size), "png", 30, name="k")
    assert original == size
    assert decode_image(found, name="x").size == smaller


def test_orientation_is_settled_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    encoded = smooth(80, 40, "JPEG", exif=exif)
    found, original = shrink_image(encoded, "jpg", 20, name="k")
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


def flat(kind: str, width: int, height: int) -> bytes:
    """An image of one colour, however large, in few bytes."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(stream, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "size", "smaller"),
    [
        ("png", (400, 3000), (107, 800)),
        ("jpg", (3000, 2900), (800, 773)),  # more pixels than may be decoded: decoded at half its size
        ("jpg", (1500, 1400), (800, 747)),  # too large as well, but half its size would be below 800
        ("webp", (2400, 300), (800, 100)),
    ],
)
def test_images_too_large_to_train_on(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: tuple[int, int], smaller: tuple[int, int]
) -> None:
    """With --max-side, the limit on decoding is the number of pixels, not the length of a side."""
    monkeypatch.setattr(images, "MAX_IMAGE_SIDE", 1000)
    monkeypatch.setattr(images, "MAX_PIXELS", 1_900_000)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 9_000_000)
    encoded = flat({"jpg": "JPEG"}.get(kind, kind), *size)
    with pytest.raises(DataError, match=r"more than 1000 a side: shrink it, for instance by `pack --max-side`"):
        image_extension(encoded, name="x")
    assert image_extension(encoded, name="x", max_side=800) == kind
    shrunk, original = shrink_image(encoded, kind, 800, name="x")
    assert original == size
    assert decode_image(shrunk, name="x").size == smaller
    assert np.abs(np.asarray(decode_image(shrunk, name="x"))[0, 0].astype(int) - (200, 30, 30)).max() < 8


@pytest.mark.parametrize(("kind", "most"), [("PNG", "1,900,000"), ("JPEG", "7,600,000")])
def test_images_too_large_to_shrink(monkeypatch: pytest.MonkeyPatch, kind: str, most: str) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1_900_000)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 4 * 1_900_000)
    with pytest.raises(
        DataError, match=f"image 'x': 3000×2900 pixels, more than the {most} that --max-side can shrink"
    ):
        image_extension(flat(kind, 3000, 2900), name="x", max_side=800)


def test_half_of_a_large_jpeg_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1_900_000)
    encoded = flat("JPEG", 3000, 2900)
    assert decode_image(encoded, name="x", max_side=800).size == (1500, 1450)
    assert decode_image(encoded, name="x", max_side=300).size == (375, 363)
    assert decode_image(encoded, name="x", max_side=1600).size == (3000, 2900)


def test_a_large_photograph_is_packed(tmp_path: Path) -> None:
    """From rows and folders alike; a --max-side above the largest allowed side is itself refused."""
    (tmp_path / "photos").mkdir()
    content = flat("PNG", 300, 9600)
    (tmp_path / "photos" / "a.png").write_bytes(content)
    (tmp_path / "photos" / "a.txt").write_text("Red.")
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "b", "image": "a.png", "conversations": talk}]))
    sources = [Source(tmp_path / "photos", rule=ReadRule("What?")), Source(tmp_path / "rows.json")]
    write_set(prepare_sources(sources, images=[tmp_path / "photos"], max_side=1024), tmp_path / "set", max_side=1024)
    packed = SampleSet.open(tmp_path / "set")
    sizes = [decode_image(packed.read(row, verify=True).images[0], name="x").size for row in range(2)]
    assert (packed.keys, sizes) == (["a", "b"], [(32, 1024)] * 2)
    with pytest.raises(ConfigError, match="--max-side 9001: at most 9000"):
        prepare_sources(sources, max_side=9001)
