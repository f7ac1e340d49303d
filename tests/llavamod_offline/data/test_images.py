"""Every outcome of decoding, and pixels equal to those of the checkpoint's own processor."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

from llavamod_offline.data import images
from llavamod_offline.data.images import ImagePreprocessor, decode_image, image_extension, pad_to_square, pixel_values
from llavamod_offline.errors import ConfigError, DataError, ModelError
from tests.tiny import tiny_image, write_image_processor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, body: bytes) -> bytes:
    """A PNG put together chunk by chunk, for headers that Pillow would not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def pixel(encoded: bytes, place: tuple[int, int] = (0, 0)) -> object:
    image = decode_image(encoded, name="x")
    assert image.mode == "RGB"
    return image.getpixel(place)


def test_plain_pictures_decode_exactly() -> None:
    array = np.random.default_rng(0).integers(0, 256, size=(7, 5, 3), dtype=np.uint8)
    for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True})):
        encoded = encode(Image.fromarray(array), kind, **settings)
        assert np.array_equal(np.asarray(decode_image(encoded, name="x")), array)
        assert image_extension(encoded, name="x") == kind.lower()


def test_extension_is_that_of_the_content() -> None:
    assert image_extension(tiny_image(0, format="JPEG"), name="photo.png") == "jpg"
    first, second = (Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE))
    stereo = encode(first, "MPO", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(stereo)) as image:
        assert image.format == "MPO"  # many phones write this as .jpg
    assert image_extension(stereo, name="phone.jpg") == "jpg"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_short_is_an_error_naming_the_picture(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(120, 90, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise), kind)
    for size in (0, 1, 20, len(encoded) // 2, len(encoded) * 9 // 10):
        with pytest.raises(DataError, match=r"image 'cut\.jpg': "):
            decode_image(encoded[:size], name="cut.jpg")


def test_a_lenient_pillow_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries set this switch for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    encoded = tiny_image(0, (100, 100), "JPEG")
    with pytest.raises(DataError, match="truncated"):
        decode_image(encoded[: len(encoded) // 2], name="x")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "encoded",
    [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encode(Image.new("P", (4, 4)), "GIF")],
    ids=["text", "svg", "gif"],
)
def test_other_formats_are_refused(encoded: bytes) -> None:
    with pytest.raises(DataError, match=r"image 'x': not a JPEG, PNG or WebP file: convert it"):
        decode_image(encoded, name="x")


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (9_001, 100), (12_000, 12_000), (201, 1), (1, 201)])
def test_too_large_is_refused_by_the_header(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be decoded: a body of zeros compresses a thousandfold."""
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"image 'bomb'.*(shrink|crop) it"):
        decode_image(png(width, height, 8, 0, bytes(1000)), name="bomb")


def test_largest_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_SIDE", 40)
    assert decode_image(encode(Image.new("RGB", (40, 30))), name="x").size == (40, 30)
    assert decode_image(encode(Image.new("RGB", (1, 1))), name="x").size == (1, 1)
    with pytest.raises(DataError, match="41×30 pixels, more than 40 a side"):
        decode_image(encode(Image.new("RGB", (41, 30))), name="x")
    monkeypatch.setattr(images, "MAX_ENCODED_BYTES", 10)
    with pytest.raises(DataError, match="bytes, more than 10"):
        decode_image(encode(Image.new("RGB", (1, 1))), name="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int, kind: str) -> None:
    """The displayed image has red at its upper left, whichever way round it is stored."""
    shown = np.zeros((16, 32, 3), dtype=np.uint8)
    shown[:8, :16] = RED
    stored = {  # orientation: how the displayed image is transformed for storage (EXIF 2.32, tag 0x0112)
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown, 1),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    encoded = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **lossless)
    decoded = np.asarray(decode_image(encoded, name="x")).astype(int)
    assert decoded.shape == shown.shape
    assert np.abs(decoded - shown).mean() < 8


def test_unreadable_exif_leaves_the_picture_as_stored() -> None:
    encoded = encode(Image.new("RGB", (8, 4), RED), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert decode_image(encoded, name="x").size == (8, 4)


def test_transparency_lies_over_white() -> None:
    assert pixel(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))) == WHITE
    assert pixel(encode(Image.new("RGBA", (2, 2), (*RED, 255)))) == RED
    assert pixel(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 51)))) == (204, 204, 204)
    assert pixel(encode(Image.new("LA", (2, 2), (0, 0)))) == WHITE
    assert pixel(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "WEBP", lossless=True)) == WHITE
    assert pixel(encode(Image.new("L", (2, 2), 7), transparency=7)) == WHITE
    assert pixel(encode(Image.new("RGB", (2, 2), RED), transparency=RED)) == WHITE
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert [pixel(encode(palette), (x, 0)) for x in (0, 1)] == [RED, (0, 0, 255)]
    assert [pixel(encode(palette, transparency=0), (x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 255)]


def test_grey_black_and_white_and_cmyk() -> None:
    assert pixel(encode(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (2, 2), 1))) == WHITE
    cmyk = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert isinstance(cmyk, tuple)
    assert np.abs(np.subtract(cmyk, RED)).max() <= 6


def test_sixteen_bits_keep_the_high_byte() -> None:
    values = [0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]
    grey = Image.fromarray(np.array([values], dtype=np.uint16))
    colour = png(2, 1, 16, 2, b"\x00" + struct.pack(">6H", 0x1234, 0x8000, 0xFFFF, 0, 255, 256))
    assert [pixel(encode(grey), (x, 0)) for x in range(6)] == [(value >> 8,) * 3 for value in values]
    assert [pixel(colour, (x, 0)) for x in (0, 1)] == [(0x12, 0x80, 0xFF), (0, 0, 1)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert pixel(encoded) == RED


def test_pad_to_square() -> None:
    fill = (1, 2, 3)
    for size, box in (((6, 3), (0, 1, 6, 4)), ((3, 6), (1, 0, 4, 6)), ((4, 4), (0, 0, 4, 4))):
        padded = pad_to_square(Image.new("RGB", size, RED), fill)
        expected = Image.new("RGB", (max(size), max(size)), fill)
        expected.paste(RED, box)
        assert padded.tobytes() == expected.tobytes()


def reference_pixels(encoded: bytes, settings: dict[str, Any], pad: bool) -> NDArray[np.float32]:
    """CLIP's preprocessing written out with Pillow and numpy."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if pad:
        canvas = Image.new("RGB", (max(image.size),) * 2, tuple(int(mean * 255) for mean in CLIP_MEAN))
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    size = settings["size"]
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)
    if settings["do_center_crop"]:
        crop = settings["crop_size"]
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    array = np.asarray(image).astype(np.float64) / 255
    std = (0.26862954, 0.26130258, 0.27577711)
    return ((array - CLIP_MEAN) / std).transpose(2, 0, 1).astype(np.float32)


def processor_folder(folder: Path, **changes: Any) -> Path:
    write_image_processor(folder)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"size": {"height": 20, "width": 28}, "do_center_crop": False}],
    ids=["shortest_edge", "height_width"],
)
@pytest.mark.parametrize("size", [(32, 24), (24, 33), (30, 30)])
def test_pixels_are_clips(tmp_path: Path, size: tuple[int, int], changes: dict[str, Any], aspect: str) -> None:
    folder = processor_folder(tmp_path, **changes)
    preprocessor = ImagePreprocessor.from_checkpoint(folder, aspect)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    encoded = tiny_image(3, size)
    pixels = preprocessor.pixels(encoded, name="x")
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, *preprocessor.size)
    assert preprocessor.fill == (122, 116, 104)
    assert np.allclose(pixels, reference_pixels(encoded, settings, aspect == "pad"), atol=1e-5)


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_rescale": False},
        {"do_normalize": False, "rescale_factor": 0.1},
        {"do_resize": False},
        {"size": {"shortest_edge": 20}},
        {"size": {"height": 30, "width": 20}, "resample": 2},
        {"size": {"height": 20, "width": 28}, "do_center_crop": False},
    ],
    ids=lambda changes: " ".join(changes) or "clip",
)
def test_pixels_are_the_processors_to_the_last_bit(tmp_path: Path, changes: dict[str, Any], aspect: str) -> None:
    """Also for images that already have the right size, and for those smaller than the crop."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = processor_folder(tmp_path, **changes)
    preprocessor = ImagePreprocessor.from_checkpoint(folder, aspect)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for width, height in ((24, 24), (28, 20), (24, 33), (33, 24), (25, 24), (23, 60), (3, 3), (60, 59), (19, 21)):
        image = Image.fromarray(noise[:height, :width])
        given = pad_to_square(image, preprocessor.fill) if aspect == "pad" else image
        (expected,) = processor(given, return_tensors="np")["pixel_values"]
        found = preprocessor.pixels(encode(image), name="x")
        assert found.flags.c_contiguous
        assert np.array_equal(found, expected.astype(np.float32))
        bytes_HW3 = np.empty((*preprocessor.size, 3), np.uint8)
        preprocessor.pixel_bytes(encode(image), bytes_HW3, name="x")
        (later,) = pixel_values(torch.from_numpy(bytes_HW3)[None], torch.from_numpy(preprocessor.byte_values_3V))
        assert np.array_equal(later.numpy(), found)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (2, 3), (1, 200)])
def test_smallest_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    for aspect in images.ASPECTS:
        preprocessor = ImagePreprocessor.from_checkpoint(processor_folder(tmp_path), aspect)
        assert preprocessor.pixels(tiny_image(0, size), name="x").shape == (3, 24, 24)


def test_other_spellings_of_a_clip_processor(tmp_path: Path) -> None:
    """Sizes as plain numbers, the older versions' name, transformers 5's nested file, a processor's file beside it."""
    expected = ImagePreprocessor.from_checkpoint(processor_folder(tmp_path))
    encoded = tiny_image(0)
    old = tmp_path / "old"
    old.mkdir()
    changes = {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}
    processor_folder(old, **changes, size=24, crop_size=24)
    nested = tmp_path / "nested"
    nested.mkdir()
    content = (tmp_path / "preprocessor_config.json").read_text()
    (nested / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "image_processor": json.loads(content)})
    )
    beside = tmp_path / "beside"
    beside.mkdir()
    (processor_folder(beside) / "processor_config.json").write_text('{"patch_size": 8}')
    for folder in (old, nested, beside):
        preprocessor = ImagePreprocessor.from_checkpoint(folder)
        assert preprocessor.describe() == expected.describe()
        assert np.array_equal(preprocessor.pixels(encoded, name="x"), expected.pixels(encoded, name="x"))


def test_describe_tells_what_decides_the_pixels(tmp_path: Path) -> None:
    plain = ImagePreprocessor.from_checkpoint(processor_folder(tmp_path)).describe()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["image_mean"] == list(CLIP_MEAN)
    changes: list[dict[str, Any]] = [
        {"size": {"shortest_edge": 30}},
        {"crop_size": {"height": 16, "width": 16}},
        {"resample": 2},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.5]},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_rescale": False},
    ]
    found = [ImagePreprocessor.from_checkpoint(processor_folder(tmp_path, **change)).describe() for change in changes]
    found.append(ImagePreprocessor.from_checkpoint(processor_folder(tmp_path), "square").describe())
    assert len({json.dumps(fields) for fields in [plain, *found]}) == len(changes) + 2


def test_preprocessor_survives_pickling(tmp_path: Path) -> None:
    preprocessor = ImagePreprocessor.from_checkpoint(processor_folder(tmp_path))
    copy = pickle.loads(pickle.dumps(preprocessor))
    encoded = tiny_image(5)
    assert np.array_equal(copy.pixels(encoded, name="x"), preprocessor.pixels(encoded, name="x"))


def test_pixels_names_the_picture(tmp_path: Path) -> None:
    preprocessor = ImagePreprocessor.from_checkpoint(processor_folder(tmp_path))
    with pytest.raises(DataError, match=r"image 'k/0\.jpg'"):
        preprocessor.pixels(tiny_image(0)[:40], name="k/0.jpg")
    with pytest.raises(DataError, match=r"image 'k/0\.jpg'"):
        preprocessor.pixel_bytes(tiny_image(0)[:40], np.empty((24, 24, 3), np.uint8), name="k/0.jpg")


def test_unusable_processors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        ImagePreprocessor.from_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="image aspect 'stretch' is unknown: choose one of pad, square"):
        ImagePreprocessor.from_checkpoint(processor_folder(tmp_path), "stretch")
    processor_folder(tmp_path, image_processor_type="Siglip2ImageProcessor")
    with pytest.raises(ModelError, match="image processor 'Siglip2ImageProcessor' is none of"):
        ImagePreprocessor.from_checkpoint(tmp_path)
    processor_folder(tmp_path, do_center_crop=False)
    assert ImagePreprocessor.from_checkpoint(tmp_path).size == (24, 24)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: its output size depends on the image"):
        ImagePreprocessor.from_checkpoint(tmp_path, "square")
    for name, content in (("pre", "{"), ("pre", "[]"), ("", '{"image_processor": 3}')):
        file = tmp_path / f"{name}processor_config.json"
        file.write_text(content)
        with pytest.raises(ModelError, match=f"/{file.stem}.json: (not readable as JSON|expected an object)"):
            ImagePreprocessor.from_checkpoint(tmp_path)
